"""On a GPU: one rank equals diffusers on the same GPU. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardit import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from shardit.models import tiny
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("name", ["wan2.2-t2v", "qwen-image", "z-image", "flux"])
def test_one_rank_equals_diffusers(name: str) -> None:
    call = {**tiny.defaults(name), "output_type": "np"}
    plain = tiny.load_plain(tiny.resolve(f"tiny/{name}")).to("cuda")
    out = plain(prompt="a cat", generator=torch.Generator("cpu").manual_seed(1), **call)
    expected = np.asarray(out.frames if hasattr(out, "frames") else out.images)
    with Omni(model=f"tiny/{name}", device="cuda") as omni:
        got = omni.generate("a cat", OmniDiffusionSamplingParams(seed=1, **call))[0]
    assert got.error is None
    assert np.array_equal(expected, np.asarray(got.latents))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_stages_equal_diffusers() -> None:
    run_ranks(2, two_stages)


def two_stages(rank: int, count: int, method: str) -> None:
    from shardit.core.comm.mesh import init_mesh

    torch.cuda.set_device(rank)
    name = "wan2.2-t2v"
    call = {**tiny.defaults(name), "output_type": "latent", "prompt": "a cat"}
    plain = tiny.load_plain(tiny.resolve(f"tiny/{name}")).to("cuda")
    expected = plain(generator=torch.Generator("cpu").manual_seed(1), **call).frames
    config = DiffusionParallelConfig(pipeline_parallel_size=count)
    from shardit.api import load_parallel

    mesh = init_mesh(config, device="cuda", rank=rank, init_method=method)
    pipe, _, _ = load_parallel(f"tiny/{name}", config, mesh)
    got = pipe(generator=torch.Generator("cpu").manual_seed(1), **call).frames
    assert torch.equal(expected, got)
