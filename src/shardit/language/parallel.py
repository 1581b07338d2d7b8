"""`parallelize` and `load` for causal language models over stages and tensor ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import init_mesh, pick_device
from shardit.core.comm.sharding_decision import collective_decision
from shardit.core.modules.compiled import refuse_compiled
from shardit.core.stages.runtime import Runtime
from shardit.errors import InputError, UnsupportedError
from shardit.language.loading.prepared import PreparedDecoder
from shardit.language.loading.source import DecoderSource
from shardit.language.sharding import DecoderLayout, check_axes, lay_out_decoder, shard_decoder
from shardit.loading.dtypes import setting
from shardit.parallel.tensor.plan import describe_slices
from shardit.parallel_state import set_mesh_of_model
from shardit.settings.lora import Lora


def is_sharded_as_decoder(model: Any, config: DiffusionParallelConfig) -> bool:
    """Return whether this is a model of transformers that is sharded as a decoder: one that generates tokens, or over
    stages one with the same layers and another head or none, or an encoder: all of them make caches and record hidden
    states in the same way."""
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return False
    return hasattr(model, "generate") or config.pipeline_parallel_size > 1


def refuse_uncut_decoder(model: Any, config: DiffusionParallelConfig) -> None:
    """Raise UnsupportedError for a model with an encoder and a decoder, whose code between both calls parts that other
    stages have, and for one that peft wraps."""
    kinds = {cls.__name__: cls.__module__ for cls in type(model).__mro__}
    name, stages = type(model).__name__, config.pipeline_parallel_size
    if kinds.get("PeftModel", "").startswith("peft.") and stages > 1:
        raise UnsupportedError(
            f"{name} wraps a model in adapters: give merge_and_unload() of it, or the model inside, base_model.model"
        )
    both = isinstance(model, PreTrainedModel) and any(path.endswith("decoder") for path, _ in model.named_modules())
    if both and stages > 1:
        raise UnsupportedError(
            f"{name} has an encoder and a decoder, which pipeline_parallel_size={stages} does not cut; use "
            "tensor_parallel_size"
        )


def is_split(config: DiffusionParallelConfig) -> bool:
    """Return whether a configuration splits a language model over ranks."""
    return config.pipeline_parallel_size * config.tensor_parallel_size > 1


def parallelize_decoder(model: Any, config: DiffusionParallelConfig, plan: Any, timeout_s: float) -> Any:
    """Shard a language model in place, unless it is sharded already, and return it. Collective."""
    name = type(model).__name__
    if plan is not None:
        raise InputError(f"plan: the layers of {name} need none; leave it out")
    if (sharded := getattr(model, "shardit_decoder", None)) is not None:
        sharded.check_config(config)
        return model
    mesh = init_mesh(config, device=next(model.parameters()).device, timeout_s=timeout_s)
    runtime = Runtime.of(mesh, split_batch=False)

    def decide() -> DecoderLayout:
        refuse_compiled(name, model, model.modules() if config.pipeline_parallel_size > 1 else ())
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise UnsupportedError(
                f"{name} was placed by accelerate, and ranks place it themselves: load it without device_map"
            )
        return lay_out_decoder(model, config)

    def describe(found: DecoderLayout) -> dict[str, str]:
        return {"the layers": repr(found.owners) + describe_slices(found.slices)}

    layout = collective_decision(runtime.replica, name, decide, describe)
    set_mesh_of_model(mesh)
    shard_decoder(model, runtime, layout, config)
    return model


def load_decoder(
    source: DecoderSource,
    config: DiffusionParallelConfig,
    dtype: Any,
    device: Any,
    timeout_s: float,
    loras: Sequence[Lora] = (),
) -> nn.Module:
    """Load the language model of a source, with adapters merged into it; each rank reads its slices of its layers.
    Collective."""
    check_axes(config)
    prepared = PreparedDecoder(source, setting(dtype), loras, generates=False)
    if not is_split(config):
        number = 0 if device is None else torch.device(device).index or 0
        return prepared.load_whole("cpu" if device is None else pick_device(device, number))
    layout = lay_out_decoder(prepared.module, config)
    mesh = init_mesh(config, device=device, timeout_s=timeout_s)
    set_mesh_of_model(mesh)
    model = prepared.load(layout, mesh.coords, mesh.device)
    shard_decoder(model, Runtime.of(mesh, split_batch=False), layout, config)
    return model
