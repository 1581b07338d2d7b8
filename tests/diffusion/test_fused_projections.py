"""The option `fuse_projections`: diffusers' own fusing over ranks, against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardit
from shardit import Omni
from shardit.errors import InputError
from tests.support.brought import mapped, run
from tests.support.fork_servers import kept_fork_server
from tests.support.ranks import run_ranks

AXES = ({"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}, {"ulysses_degree": 2})
EXPERTS = ("transformer", "transformer_2")


def fused(pipe: Any, *names: str) -> set[str]:
    """The modules that have one linear for queries, keys and values, or for the last two."""
    parts = [(name, *one) for name in names for one in getattr(pipe, name).named_modules()]
    return {f"{name}.{at}" for name, at, part in parts if hasattr(part, "to_qkv") or hasattr(part, "to_kv")}


def two_ranks(rank: int, count: int, method: str) -> list[tuple[set[str], torch.Tensor]]:
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    made = []
    for axes in AXES:
        pipe = shardit.load("tiny/flux", dtype="float32", fuse_projections=True, **axes)
        made.append((fused(pipe, "transformer"), run(pipe, "flux")))
    pipe = shardit.load("tiny/wan2.2-t2v", dtype="float32", fuse_projections=True, **AXES[0])
    return [*made, (fused(pipe, *EXPERTS), run(pipe, "wan2.2-t2v"))]


def test_over_ranks() -> None:
    flux, wan = mapped("flux"), mapped("wan2.2-t2v")
    flux.transformer.fuse_qkv_projections()
    for name in EXPERTS:
        getattr(wan, name).fuse_qkv_projections()
    wanted = [(flux, "flux", ["transformer"])] * 3 + [(wan, "wan2.2-t2v", EXPERTS)]
    for of_rank in run_ranks(2, two_ranks):
        for number, ((names, made), (plain, model, parts)) in enumerate(zip(of_rank, wanted, strict=True)):
            assert names
            assert names == fused(plain, *parts)
            expected = run(plain, model)
            if number in (1, 2):
                assert float((made - expected).norm() / expected.norm()) <= 1e-5
            else:
                assert torch.equal(made, expected)
    assert not fused(mapped("flux"), "transformer")


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (
            "tiny/qwen-image",
            {},
            "QwenImageTransformer2DModel of QwenImagePipeline cannot fuse its projections",
        ),
        ("tiny/flux", {"lora": "a"}, "fuse_projections would leave out the weights of lora"),
        ("tiny/flux", {"fuse_projections": 1}, "fuse_projections must be True or False"),
    ],
)
def test_refused(model: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        with kept_fork_server():
            Omni(model, **{"fuse_projections": True, **options})
