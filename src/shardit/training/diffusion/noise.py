"""Random numbers of a sample: from its seed alone, on the CPU, so that they are the same wherever it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardit.training.seeds import SEEDS, derived


def noise_of(seeds: Sequence[int] | torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the noise of samples with one shape, stacked; float32."""
    return torch.stack([torch.randn(list(shape), generator=_generator(int(seed))) for seed in seeds])


def uniform_of(seed: int) -> float:
    """Return the number in (0, 1) that decides the timestep of a sample."""
    draw = torch.rand((), generator=_generator(derived(seed, "timestep")), dtype=torch.float64)
    return min(max(float(draw), 1e-9), 1 - 1e-9)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % SEEDS)
