"""Pipelines that set attention processors in the middle of their call: plans of calls without them are not reused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import shardit
from shardit import DiffusionParallelConfig
from tests.diffusion.test_parallelize import join
from tests.pipelines import of_stable_diffusion_base, parts
from tests.support.ranks import run_ranks

CONFIGS = {
    "stages": DiffusionParallelConfig(pipeline_parallel_size=2),
    "guidance": DiffusionParallelConfig(cfg_parallel_size=2),
}


def picture(pipe: Any, **options: Any) -> torch.Tensor:
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16, **options}
    return pipe(**call, generator=torch.Generator().manual_seed(1)).images


def pictures(shard: Callable[[Any], Any]) -> list[torch.Tensor]:
    """A plain pipeline, perturbed attention guidance over the same parts, and the plain one again; then one pipeline
    whose first call is without guidance of that kind."""
    plain = shard(parts.pipeline("StableDiffusionPipeline", **of_stable_diffusion_base.components()))
    outs = [picture(plain)]
    made: Any = diffusers.StableDiffusionPAGPipeline
    perturbed = made(**plain.components, pag_applied_layers=["mid"])
    outs += [picture(perturbed, pag_scale=2.0), picture(perturbed, pag_scale=2.0), picture(plain)]
    pipe = parts.pipeline(
        "StableDiffusionPAGPipeline", **of_stable_diffusion_base.components(), pag_applied_layers=["mid"]
    )
    shard(pipe)
    return outs + [picture(pipe, pag_scale=scale) for scale in (0.0, 2.0, 0.0)]


def on_ranks(rank: int, count: int, method: str, name: str) -> list[torch.Tensor]:
    join(rank, count, method)
    return pictures(lambda pipe: shardit.parallelize(pipe, CONFIGS[name], timeout_s=60))


@pytest.mark.parametrize("name", CONFIGS)
def test_processors_that_a_call_sets(name: str) -> None:
    expected = pictures(lambda pipe: pipe)
    for outs in run_ranks(2, on_ranks, name):
        for number, (wanted, got) in enumerate(zip(expected, outs, strict=True)):
            assert float((wanted - got).norm() / wanted.norm()) < 1e-5, number
