"""Pipelines on one rank, and over ranks that share one device, compared with plain diffusers on that device."""

from __future__ import annotations

import numpy as np
import torch

import shardit
from shardit import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from shardit.models import tiny
from tests.support import brought
from tests.support.whole_pipelines import pictures

AXES: dict[str, tuple[int, dict[str, int]]] = {
    "stages": (2, {"pipeline_parallel_size": 2}),
    "four stages": (4, {"pipeline_parallel_size": 4}),
    "guidance": (2, {"cfg_parallel_size": 2}),
    "slices": (2, {"tensor_parallel_size": 2}),
    "four slices": (4, {"tensor_parallel_size": 4}),
    "ulysses": (2, {"ulysses_degree": 2}),
    "four of ulysses": (4, {"ulysses_degree": 4}),
    "ring": (2, {"ring_degree": 2}),
    "four of ring": (4, {"ring_degree": 4}),
    "tokens": (4, {"ulysses_degree": 2, "ring_degree": 2}),
    "stages of slices": (4, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}),
    "replicas of stages": (4, {"data_parallel_size": 2, "pipeline_parallel_size": 2}),
}
"""Number of ranks and their arrangement."""

BITWISE = ("stages", "four stages", "guidance", "replicas of stages")


def on_one_rank(name: str, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the output of plain diffusers and that of `Omni` for a tiny model, which gets images if it takes some."""
    call = {**tiny.defaults(name), "output_type": "np"}
    given = pictures(tiny.images(name), "RGBA" if "layered" in name else "RGB")
    images = {} if not given else {"image": given if len(given) > 1 else given[0]}
    plain = tiny.load_plain(tiny.resolve(f"tiny/{name}")).to(device)
    plain.set_progress_bar_config(disable=True)
    out = plain(prompt="a cat", generator=torch.Generator("cpu").manual_seed(1), **images, **call)
    with Omni(model=f"tiny/{name}", device=device) as omni:
        params = OmniDiffusionSamplingParams(seed=1, **call)
        (made,) = omni.generate({"prompt": "a cat", **images}, params)
    assert made.error is None, made.error
    return np.asarray(out.frames if hasattr(out, "frames") else out.images), np.asarray(made.latents)


def run_axis(rank: int, count: int, method: str, axis: str, device: str) -> float:
    """Return the relative distance of the latents of a call with guidance from those of plain diffusers."""
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    call = {**tiny.defaults("flux"), "output_type": "latent", "true_cfg_scale": 3.0, "negative_prompt": "dark"}

    def latents(sharded: bool) -> torch.Tensor:
        pipe = brought.pipeline("flux").to(device)
        pipe.set_progress_bar_config(disable=True)
        if sharded:
            config = DiffusionParallelConfig(**AXES[axis][1], split_batch=False, transport="host")
            shardit.parallelize(pipe, config, timeout_s=60)
        return pipe(prompt="a cat", generator=torch.Generator("cpu").manual_seed(1), **call).images

    expected, made = latents(False), latents(True)
    return float((made - expected).norm() / expected.norm())
