"""What others offer for the same model and ranks: context parallelism of diffusers, tensor parallelism of torch, xDiT,
vLLM-Omni.

Packages of others are no dependencies: a peer whose packages are not installed is skipped. torch is imported by the
ranks alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

from bench.packages import missing
from bench.vllm_omni import use_vllm_omni
from bench.xdit import use_xdit


@dataclass(frozen=True)
class Peer:
    """A way to run a WanPipeline on ranks.

    apply: changes a pipeline of diffusers in place, on every rank of the default process group; all of them then make
    the same call, or with ranks=1 one of them does. modules: top-level modules beyond those of shardit; packages: what
    pip installs for them.
    """

    apply: Callable[[Any], None]
    modules: tuple[str, ...] = ()
    packages: str = ""
    ranks: int = 2


def not_installed(name: str) -> str | None:
    """Return why this one of `PEERS` cannot be measured here, and the command that changes it; None if it can."""
    absent = missing(PEERS[name].modules)
    if not absent:
        return None
    verb = "is" if len(absent) == 1 else "are"
    return f"{', '.join(absent)} {verb} not installed: python -m pip install --no-deps {PEERS[name].packages}"


def context_parallel(**degrees: int) -> Callable[[Any], None]:
    """`enable_parallelism` of diffusers with these degrees."""

    def apply(pipeline: Any) -> None:
        from diffusers import ContextParallelConfig
        from diffusers.models import attention_dispatch

        attention_dispatch._native_attention_forward_op = _attention_with_lse  # theirs has no log-sum-exp for Ring
        with mock.patch("torch.accelerator.device_count", return_value=1):  # it divides by the number, none on a CPU
            pipeline.transformer.enable_parallelism(config=ContextParallelConfig(**degrees))

    return apply


def _attention_with_lse(
    _ctx: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float, causal: bool, *rest: Any, **options: Any
) -> Any:
    """The native attention of diffusers for a CPU, with torch's kernel that returns the log-sum-exp too."""
    import torch

    q, k, v = (t.permute(0, 2, 1, 3) for t in (query, key, value))
    if not (options.get("return_lse") or rest[-1:] == (True,)):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal).permute(0, 2, 1, 3)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, attn_mask=mask)
    return out.permute(0, 2, 1, 3), lse.transpose(1, 2)


def dtensor(pipeline: Any) -> None:
    """DTensor slices as in torch's tutorial: columns in, rows out. The norms across all heads run on shards of tokens,
    which moves fewer bytes than gathering queries and keys."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = {"to_q": ColwiseParallel(use_local_output=False), "to_k": ColwiseParallel(use_local_output=False)}
    norms = {"norm_q": SequenceParallel(use_local_output=False), "norm_k": SequenceParallel(use_local_output=False)}
    attention = {**columns, **norms, "to_v": ColwiseParallel(), "to_out.0": RowwiseParallel()}
    for block in pipeline.transformer.blocks:
        for attn in (block.attn1, block.attn2):
            parallelize_module(attn, mesh, attention)
            attn.heads //= mesh.size()
            for norm in (attn.norm_q, attn.norm_k):
                norm.register_forward_hook(_own_heads(mesh))
        parallelize_module(block.ffn, mesh, {"net.0.proj": ColwiseParallel(), "net.2": RowwiseParallel()})


def _own_heads(mesh: Any) -> Callable[..., Any]:
    from torch.distributed.tensor import Shard

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        return out.redistribute(mesh, [Shard(2)]).to_local()

    return hook


XDIT = {"modules": ("xfuser", "yunchang", "einops"), "packages": "xfuser yunchang einops"}
OMNI = {"modules": ("vllm_omni", "einops"), "packages": "vllm-omni einops"}

PEERS: dict[str, Peer] = {
    "diffusers, Ulysses": Peer(context_parallel(ulysses_degree=2)),
    "diffusers, Ring": Peer(context_parallel(ring_degree=2)),
    "torch DTensor, slices": Peer(dtensor),
    "xDiT, Ulysses": Peer(partial(use_xdit, ulysses=2), **XDIT),
    "xDiT, Ring": Peer(partial(use_xdit, ring=2), **XDIT),
    "vLLM-Omni, one rank": Peer(use_vllm_omni, **OMNI, ranks=1),
    "vLLM-Omni, Ulysses": Peer(partial(use_vllm_omni, ulysses=2), **OMNI),
    "vLLM-Omni, slices": Peer(partial(use_vllm_omni, tensor=2), **OMNI),
}
