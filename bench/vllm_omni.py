"""vLLM-Omni's own transformer for Wan on a CPU, with the weights of a WanPipeline: one rank, Ulysses, slices.

Tested with vllm-omni 0.30.0, without vllm, whose names are those of `bench/vllm_names.py`. The loop over steps is that
of diffusers, so differences in speed are those of the transformer.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from types import SimpleNamespace
from typing import Any

from bench.packages import placeholders, without_init


def use_vllm_omni(pipeline: Any, *, ulysses: int = 1, tensor: int = 1) -> None:
    """Replace the transformer of a WanPipeline by vLLM-Omni's, with the same weights.

    With degrees of 1 this rank works alone; otherwise all ranks of the default group call this.
    """
    modules = _import()
    activate = _contexts(modules, ulysses, tensor)
    with activate() as context, modules.config.set_current_diffusion_config(context.omni_diffusion_config):
        transformer = _with_weights(modules, pipeline.transformer)
    if ulysses > 1:
        degrees = SimpleNamespace(ulysses_degree=ulysses, ring_degree=1)
        modules.sequence_parallel.apply_sequence_parallel(transformer, degrees, transformer._sp_plan)
    forward = transformer.forward

    def in_context(*args: Any, **kwargs: Any) -> Any:
        with activate() as context:
            context.sp_plan_hooks_applied = ulysses > 1
            return forward(*args, **kwargs)

    transformer.forward = in_context
    # The pipeline of diffusers expects these two.
    transformer.device, transformer.cache_context = pipeline.device, lambda *_, **__: contextlib.nullcontext()
    pipeline.transformer = transformer.eval()


def _import() -> Any:
    """The modules of vLLM-Omni that are used here."""
    from bench import vllm_names

    package = "vllm_omni.diffusion"
    logging.getLogger("vllm_omni").setLevel(logging.ERROR)  # each forward warns of splits that Wan does not need
    # Besides vllm: detection of GPUs, quantization, settings of the engine.
    placeholders(("vllm", "vllm_omni.platforms", "vllm_omni.quantization", f"{package}.data"), vllm_names.NAMES)
    # Their `__init__` patch vllm and import all models.
    without_init("vllm_omni", package, f"{package}.models", f"{package}.models.wan2_2")
    from vllm_omni.diffusion import config, forward_context
    from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.hooks import sequence_parallel
    from vllm_omni.diffusion.models.wan2_2 import wan2_2_transformer

    SDPAImpl.forward = SDPAImpl._forward_impl  # otherwise chosen by the kind of GPU
    return SimpleNamespace(
        config=config,
        forward_context=forward_context,
        parallel_state=parallel_state,
        sequence_parallel=sequence_parallel,
        tensor_ranks=vllm_names.ranks,
        transformer=wan2_2_transformer,
    )


def _contexts(modules: Any, ulysses: int, tensor: int) -> Any:
    """A function that sets what is global in vLLM-Omni: several pipelines take turns here."""
    import torch.distributed as dist

    parallel = SimpleNamespace(
        ulysses_degree=ulysses,
        ring_degree=1,
        allgather_degree=1,
        sequence_parallel_size=ulysses,
        ulysses_mode="strict",
        mask_sp_padding=False,
    )
    config = SimpleNamespace(parallel_config=parallel, diffusion_attention_config=None)
    sp_group = _sp_group(modules, ulysses) if ulysses > 1 else None
    rank = dist.get_rank() if tensor > 1 else 0

    @contextlib.contextmanager
    def activate() -> Any:
        modules.parallel_state._SP = sp_group
        modules.parallel_state._PP = SimpleNamespace(world_size=1, rank_in_group=0)
        modules.tensor_ranks.rank, modules.tensor_ranks.count = rank, tensor
        with modules.forward_context.set_forward_context(omni_diffusion_config=config):
            yield modules.forward_context.get_forward_context()

    return activate


def _sp_group(modules: Any, ulysses: int) -> Any:
    """Its group of all ranks over the tokens."""
    import torch.distributed as dist

    ranks = list(range(ulysses))
    alone = [dist.new_group([rank]) for rank in ranks][dist.get_rank()]
    return modules.parallel_state.init_model_parallel_group(
        group_ranks=[ranks],
        local_rank=dist.get_rank(),
        backend="gloo",
        parallel_mode="sequence",
        ulysses_group=dist.new_group(ranks),
        ring_group=alone,
        allgather_group=alone,
    )


def _with_weights(modules: Any, plain: Any) -> Any:
    """Its transformer with this rank's part of the weights of diffusers' transformer."""
    kind = modules.transformer.WanTransformer3DModel
    known = inspect.signature(kind).parameters
    transformer = kind(**{name: value for name, value in plain.config.items() if name in known})
    transformer.load_weights(plain.state_dict().items())
    return transformer.to(plain.dtype)
