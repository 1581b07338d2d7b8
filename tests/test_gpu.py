"""On a GPU: one rank equals the plain library on the same GPU, and so do ranks that share it.

Skipped without a GPU; `tests/core/test_host_group.py` runs the same functions of ranks on CPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shardit import LLM, DiffusionParallelConfig, SamplingParams
from shardit.models import tiny
from tests.support.ranks import run_ranks
from tests.support.shared_device import AXES, BITWISE, on_one_rank, run_axis

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("name", tiny.names())
def test_one_rank_equals_diffusers(name: str) -> None:
    expected, made = on_one_rank(name, "cuda")
    assert np.array_equal(expected, made)


@pytest.mark.parametrize("axis", AXES)
def test_ranks_that_share_the_gpu(axis: str) -> None:
    count = AXES[axis][0]
    for distance in run_ranks(count, run_axis, axis, "cuda", timeout=600):
        assert distance <= (0 if axis in BITWISE else 1e-4)


def test_a_language_model_on_stages_that_share_the_gpu() -> None:
    params, made = SamplingParams(max_tokens=12, temperature=0), []
    for options in ({}, {"pipeline_parallel_size": 2, "transport": "host"}):
        with LLM("tiny/llama", device="cuda", **options) as llm:
            made.append([output.outputs[0].token_ids for output in llm.generate(["a cat", "two dogs run"], params)])
    assert made[0] == made[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_stages_equal_diffusers() -> None:
    run_ranks(2, two_stages)


def two_stages(rank: int, count: int, method: str) -> None:
    from shardit.api import load_parallel
    from shardit.core.comm.mesh import init_mesh

    torch.cuda.set_device(rank)
    name = "wan2.2-t2v"
    call: dict[str, Any] = {**tiny.defaults(name), "output_type": "latent", "prompt": "a cat"}
    plain = tiny.load_plain(tiny.resolve(f"tiny/{name}")).to("cuda")
    expected = plain(generator=torch.Generator("cpu").manual_seed(1), **call).frames
    config = DiffusionParallelConfig(pipeline_parallel_size=count)
    mesh = init_mesh(config, device="cuda", rank=rank, init_method=method)
    pipe, _, _ = load_parallel(f"tiny/{name}", config, mesh)
    got = pipe(generator=torch.Generator("cpu").manual_seed(1), **call).frames
    assert torch.equal(expected, got)
