"""Adds noise to trial inputs and compares results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardit.core.runtime.microbatch import CLOSE

SLACK = {torch.float32: 2.0}
"""One block in float32 may differ a little more than a whole model may (`CLOSE`), whose sums average it out."""


def perturbed(leaves: list[Any]) -> list[Any]:
    """Return the leaves with noise in every tensor of numbers or of booleans, the same noise on every rank."""
    generator = torch.Generator("cpu").manual_seed(0)
    made: dict[int, torch.Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and id(leaf) not in made:
            made[id(leaf)] = _perturb(leaf, generator)
    return [made[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _perturb(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.ndim < 2 or tensor.numel() == 0:
        return tensor
    if tensor.dtype is torch.bool:
        flipped = tensor ^ (torch.rand(tensor.shape, generator=generator) < 0.3).to(tensor.device)
        flipped[..., 0] = True  # a query with all keys masked would prove nothing
        return flipped
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    wide = torch.complex64 if tensor.is_complex() else torch.float32
    noise = torch.randn(tensor.shape, generator=generator, dtype=wide).to(tensor.device)
    size = tensor.abs().double()
    finite = size.isfinite() & (size < 1e4)  # -inf and similar values hide keys in masks
    scale = float(size[finite].mean()) if bool(finite.any()) else 0.0
    return (tensor + 0.3 * (scale or 1.0) * noise).to(tensor.dtype)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Return whether two tensors have the same values; all NaN are equal."""
    return torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))


def same_left(whole: Sequence[torch.Tensor], sharded: Sequence[torch.Tensor]) -> bool:
    """Return whether a call leaves the same on modules; what has another shape is taken for a shard."""
    alike = (x.shape != y.shape or close(x, y) for x, y in zip(whole, sharded, strict=False))
    return len(whole) == len(sharded) and all(alike)


def close(x: Any, y: Any) -> bool:
    """Return whether two results of a block differ by rounding only; equal if they are not tensors."""
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return x is y or bool(x == y)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    wide = torch.complex128 if x.is_complex() else torch.float64
    a, b = torch.nan_to_num(x.to(wide)), torch.nan_to_num(y.to(wide))
    bound = CLOSE.get(x.dtype, 0.0) * SLACK.get(x.dtype, 1.0)
    return bool((a - b).norm() <= bound * a.norm())
