"""The option `fuse_projections`: diffusers' own fusing over ranks, against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.attention_processor import AttnProcessor2_0

import shardit
from shardit import Omni
from shardit.core.modules.fingerprint import Change
from shardit.diffusion.sharding.component_sharding import _describe
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


def unfused_vae(pipe: Any) -> list[torch.Tensor]:
    """Pictures of a pipeline whose VAE is fused, then not, then fused again, and random numbers after each change:
    new linears are initialised at random."""
    made = []
    torch.manual_seed(0)
    for change in ("fuse", "unfuse", "fuse"):
        getattr(pipe.vae, f"{change}_qkv_projections")()
        made += [torch.rand(2), run(pipe, "flux", output_type="pt")]
    pipe.transformer.fuse_qkv_projections()
    return [*made, torch.rand(2)]


def unfused_on_ranks(rank: int, count: int, method: str) -> list[torch.Tensor]:
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    return unfused_vae(shardit.load("tiny/flux", dtype="float32", pipeline_parallel_size=2))


def test_a_vae_is_fused_and_unfused_after_the_spread() -> None:
    expected = unfused_vae(mapped("flux"))
    for made in run_ranks(2, unfused_on_ranks):
        assert all(map(torch.equal, made, expected))


def test_changes_are_described_alike_on_all_ranks() -> None:
    """Addresses of objects differ, and so does the order of sets of strings."""

    def text(names: str) -> str:
        before = {"a.processor": AttnProcessor2_0(), "b": [AttnProcessor2_0(), (1.5, {*names})]}
        return _describe(Change("", "original_attn_processors", before, {}))

    assert text("xyz") == text("zyx")
    assert text("xyz") != text("xy")


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
