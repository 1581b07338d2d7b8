"""Ulysses and Ring of xDiT (package `xfuser`) on a CPU: its transformer for Wan, its attention over sharded tokens.

Tested with xfuser 0.7.0 and yunchang 0.6.4. xfuser expects a GPU; every change for a CPU is in this file.
"""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

from bench.packages import placeholder_triton, without_init


def use_xdit(pipeline: Any, *, ulysses: int = 1, ring: int = 1) -> None:
    """Replace the transformer of a WanPipeline by xDiT's, with the same weights, on all ranks of the default group."""
    modules = _import()
    sp_group, groups = _groups(modules, ulysses, ring)
    state = _runtime_state(modules, pipeline, ulysses, ring)
    plain = pipeline.transformer
    transformer = modules["transformer_wan"].xFuserWanTransformer3DWrapper.from_config(plain.config)
    transformer.load_state_dict(plain.state_dict())

    def activate(*_: Any) -> None:  # these are global in xfuser, and several pipelines take turns here
        modules["parallel_state"]._SP = sp_group
        modules["runtime_state"]._RUNTIME = state
        modules["usp"].PROCESS_GROUP = groups  # None without a GPU

    transformer.register_forward_pre_hook(activate)
    pipeline.transformer = transformer.eval()


def _import() -> dict[str, Any]:
    """The modules of xfuser that Wan needs, by name."""
    without_init("xfuser")  # it imports all pipelines, and with them further packages
    # The version of the device is asked for at import; "mps" is the only device that may have none.
    no_version = mock.patch("torch.backends.mps.is_available", return_value=True)
    quiet = mock.patch.dict(os.environ, LOG_LEVEL="error")  # its log goes to the output of the bench
    with placeholder_triton(), no_version, quiet:
        from xfuser import envs

        envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True  # yunchang counts only next to a GPU
        import xfuser.core.distributed  # first, as modules of xfuser import each other in circles
        import xfuser.core.fast_attention  # noqa: F401
        from xfuser.config import args
        from xfuser.core.distributed import attention_backend, parallel_state, runtime_state
        from xfuser.model_executor.layers import usp
        from xfuser.model_executor.models.transformers import transformer_wan

    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    kinds = attention_backend.AttentionBackendType
    attention_backend.ATTENTION_FUNCTION_REGISTRY[kinds.SDPA_FLASH] = _attention_with_lse
    return {
        "args": args,
        "parallel_state": parallel_state,
        "runtime_state": runtime_state,
        "usp": usp,
        "transformer_wan": transformer_wan,
    }


def _attention_with_lse(
    query: Any, key: Any, value: Any, dropout_p: float, is_causal: bool, attention_kwargs: Any = None
) -> tuple[Any, Any]:
    """The kernel for CPUs in place of the one for GPUs; Ring needs its log-sum-exp."""
    import torch

    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal)


def _groups(modules: dict[str, Any], ulysses: int, ring: int) -> tuple[Any, Any]:
    """xfuser's group of all ranks over the tokens, and yunchang's groups in it."""
    import torch.distributed as dist
    from yunchang import globals as yunchang

    rank, count = dist.get_rank(), dist.get_world_size()
    yunchang.set_seq_parallel_pg(ulysses, ring, rank, count)
    groups = SimpleNamespace(ULYSSES_PG=yunchang.PROCESS_GROUP.ULYSSES_PG, RING_PG=yunchang.PROCESS_GROUP.RING_PG)
    sp_group = modules["parallel_state"].init_model_parallel_group(
        group_ranks=[list(range(count))],
        local_rank=rank,
        backend="gloo",  # its default asks for a GPU
        parallel_mode="sequence",
        ulysses_group=groups.ULYSSES_PG,
        ring_group=groups.RING_PG,
    )
    return sp_group, groups


def _runtime_state(modules: dict[str, Any], pipeline: Any, ulysses: int, ring: int) -> Any:
    """xfuser's settings for these degrees."""
    attention = "sdpa_flash" if ring > 1 else "sdpa"  # of those for a CPU, only the first is allowed with Ring
    args = modules["args"].xFuserArgs(model="", ulysses_degree=ulysses, ring_degree=ring, attention_backend=attention)
    config, _ = args.create_config()
    kind = modules["runtime_state"].DiTRuntimeState
    with mock.patch.object(kind, "_check_distributed_env"):  # it would make groups for all axes
        return kind(pipeline, config)
