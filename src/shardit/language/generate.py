"""Calls and `generate` of a causal language model over ranks: every rank runs the same code of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, QuantizedCache

from shardit.core.decoder.decoder_stages import DecoderStages
from shardit.core.decoder.stage_tensor import materialized
from shardit.core.modules.compiled import refuse_compiling
from shardit.core.runtime.digests import named
from shardit.core.runtime.no_gradients import refuse_gradients
from shardit.core.stages.runtime import Runtime
from shardit.errors import InputError, UnsupportedError
from shardit.language.changes import Changes
from shardit.language.collected_outputs import CollectedOutputs
from shardit.language.user_code import AlikeStreamer, candidates_member, criteria_member, processors_member
from shardit.parallel.tensor.check.units import Checks

_QUANTIZED = (
    "cache_implementation='quantized': the scales of quantized keys are those of all heads, and each tensor rank has "
    "some of these; leave it out, or use pipeline_parallel_size"
)


def members_of(
    model: Any, stages: DecoderStages | None, runtime: Runtime, collected: CollectedOutputs, changes: Changes
) -> dict[str, Callable[..., Any]]:
    """Return the methods of a model over stages or tensor ranks."""
    cls = type(model)
    members = {"__call__": call_member(cls, stages, runtime, collected, changes=changes)}
    if not hasattr(cls, "generate"):  # without a head, or with one that does not make tokens
        return members
    members |= {
        "generate": _generate_member(cls, stages, runtime, changes),
        "_get_stopping_criteria": criteria_member(cls, stages, runtime),
        "_get_logits_processor": processors_member(cls, runtime),
        "_get_candidate_generator": candidates_member(cls, runtime),
    }
    if "tp" in runtime.mesh.axes:  # keys are allocated at the first update, since a rank has only some heads
        members["_get_static_cache_init_shape"] = lambda self, *args, **kwargs: None
    return members


def call_member(
    cls: type,
    stages: DecoderStages | None,
    runtime: Runtime,
    collected: CollectedOutputs,
    checks: Checks | None = None,
    changes: Changes | None = None,
) -> Callable[..., Any]:
    """Return the `__call__` of a model, or of the headless model inside it; called directly, it returns plain tensors.
    checks, changes: of the slices of the enclosing model, and of users."""
    own_call: Any = cls.__call__

    @functools.wraps(own_call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_compiling(cls.__name__, torch.compiler.is_compiling())
        if "tp" in runtime.mesh.axes and any(isinstance(one, QuantizedCache) for one in (*args, *kwargs.values())):
            raise UnsupportedError(_QUANTIZED)
        alone = not runtime.in_pipeline
        if alone:
            args, kwargs = materialized((args, kwargs))  # of a part of the model that was called directly
            refuse_gradients(self, tree_leaves((args, kwargs)))
        with runtime.pipeline_call(cls.__name__, lambda: named(own_call, args, kwargs)), torch.no_grad():
            if alone and changes is not None:
                changes.check()
            if alone and stages is not None:
                _check_tokens(self, named(cls.forward, args, kwargs))
            try:
                with checks.begin(args, kwargs) if alone and checks is not None else nullcontext():
                    out = collected.of_all_heads(own_call(self, *args, **kwargs))
            finally:
                if stages is not None:
                    stages.end_call()
            return _plain(out) if alone else out

    return __call__


def _generate_member(cls: Any, stages: DecoderStages | None, runtime: Runtime, changes: Changes) -> Callable[..., Any]:
    own_generate = cls.generate

    @functools.wraps(own_generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        streamer = kwargs.pop("streamer", None)
        args, kwargs = materialized((args, kwargs))

        def compared() -> dict[str, Any]:
            found = {"model.generation_config": self.generation_config, **named(own_generate, args, kwargs)}
            return {
                name: value.to_dict() if isinstance(value, GenerationConfig) else value for name, value in found.items()
            }

        with runtime.pipeline_call(f"{cls.__name__}.generate", compared):
            changes.check()
            if stages is not None:
                _check_tokens(self, named(own_generate, args, kwargs))
            if streamer is not None:
                kwargs["streamer"] = AlikeStreamer(streamer, runtime)
            return _plain(own_generate(self, *args, **kwargs))

    return generate


def input_embeddings(model: Any) -> nn.Module | None:
    """Return the embedding of tokens; None for a model without one, or with inputs of several kinds."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _check_tokens(model: Any, given: dict[str, Any]) -> None:
    """Raise InputError for tokens beyond the vocabulary, on which the embedding would fail, on one stage only. Models
    with images may have tokens of their own for these."""
    ids = next((given[name] for name in ("input_ids", "inputs") if given.get(name) is not None), None)
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or not ids.numel():
        return
    table = input_embeddings(model)
    if model.config.get_text_config() is not model.config or not isinstance(table, nn.Embedding):
        return
    size = max(table.num_embeddings, model.config.vocab_size)  # of slices, and with rows for more tokens
    if wrong := [token for token in (int(ids.min()), int(ids.max())) if not 0 <= token < size]:
        raise InputError(
            f"input_ids has the token {wrong[0]}, and those of {type(model).__name__} go from 0 to {size - 1}"
        )


def _plain(out: Any) -> Any:
    """Return a result with plain tensors on every rank."""
    if isinstance(out, dict):  # a ModelOutput
        for name, value in list(out.items()):
            out[name] = materialized(value)
        return out
    return materialized(out)
