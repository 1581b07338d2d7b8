"""Guided calls of a pipeline whose transformer was changed: plain, and on ranks, where they may be refused."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.models import tiny
from tests.diffusion.test_parallelize import join
from tests.support.brought import pipeline

Change = Callable[[Any], None]

CONFIGS = {
    "stages": DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False),
    "guidance": DiffusionParallelConfig(cfg_parallel_size=2, split_batch=False),
    "slices": DiffusionParallelConfig(tensor_parallel_size=2),
    "ulysses": DiffusionParallelConfig(ulysses_degree=2),
}


def latents(change: Change, shard: Callable[[Any], Any] = lambda pipe: pipe) -> torch.Tensor:
    """Return the latents after five steps of a fresh pipeline of four blocks, after a change of its transformer."""
    pipe = pipeline("qwen-image")
    del pipe.transformer.transformer_blocks[4:]
    pipe.transformer.register_to_config(num_layers=4)
    change(pipe.transformer)
    pipe = shard(pipe)
    torch.manual_seed(1)
    random.seed(1)
    call = {**tiny.defaults("qwen-image"), "prompt": "a cat", "negative_prompt": "a dog", "true_cfg_scale": 4.0}
    call |= {"num_inference_steps": 5, "output_type": "latent"}
    return pipe(**call, generator=torch.Generator().manual_seed(3)).images


@functools.cache
def plain(change: Change) -> torch.Tensor:
    """The latents on one rank."""
    return latents(change)


def outcomes(rank: int, count: int, method: str, axis: str, changes: Sequence[Change]) -> list[torch.Tensor | str]:
    """For each change the latents over the ranks, or why they were refused."""
    join(rank, count, method)
    found: list[torch.Tensor | str] = []
    for change in changes:
        try:
            found.append(latents(change, lambda pipe: shardit.parallelize(pipe, CONFIGS[axis], timeout_s=60)))
        except UnsupportedError as error:
            found.append(str(error))
    return found


def check(got: torch.Tensor | str, change: Change, bound: float) -> None:
    """The latents are those of one rank, within a relative L2 distance."""
    assert isinstance(got, torch.Tensor), (change.__name__, got)
    expected = plain(change)
    assert float((expected - got).norm() / expected.norm()) <= bound, change.__name__
