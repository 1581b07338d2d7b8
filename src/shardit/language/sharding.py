"""Sharding of a causal language model over stages and tensor ranks, in place."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shardit.config import DiffusionParallelConfig, fitting_partition
from shardit.core.comm.collectives import Collectives
from shardit.core.decoder.decoder_stages import DecoderStages
from shardit.core.decoder.tensor_exchange import TensorExchange
from shardit.core.modules.absent import mark_absent, partial_state_dict, refuse_partial_states
from shardit.core.modules.blocks import drop_blocks, find_blocks
from shardit.core.modules.hooks import add_libraries
from shardit.core.modules.patching import fixed_device_to, plain_class, subclass_in_place
from shardit.core.placement.partition import balanced_cuts
from shardit.core.stages.runtime import Runtime
from shardit.errors import InputError, UnsupportedError
from shardit.language.cache_size import cache_bytes, request_tokens
from shardit.language.caches import StageCaches
from shardit.language.changes import Changes
from shardit.language.collected_outputs import CollectedOutputs
from shardit.language.generate import call_member, input_embeddings, members_of
from shardit.language.limits import check_axes
from shardit.language.tensor import FAMILY, LIBRARIES, describe_replicated, plan_decoder
from shardit.parallel.tensor.apply import cut_model, notes_together
from shardit.parallel.tensor.plan import TensorPlan

log = logging.getLogger(__name__)


_SAVES = "each rank holds only its own part; save the model before parallelize"
_VOCABULARY = "each rank holds only its own part of the vocabulary; change it before parallelize"
_BATCHES = "continuous batches of transformers run in a thread of one rank; use `generate`, or shardit.LLM"
REFUSED = {
    **dict.fromkeys(("save_pretrained", "push_to_hub"), _SAVES),
    **dict.fromkeys(("resize_token_embeddings", "set_input_embeddings", "set_output_embeddings"), _VOCABULARY),
    "tie_weights": _VOCABULARY,
    **dict.fromkeys(("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"), _BATCHES),
}
"""Methods that do not run over several ranks, with the reasons."""


def blocks_of(model: Any) -> list[tuple[str, nn.Module]]:
    """Return embedding, layers and head of a causal language model, in the order in which a forward runs them."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = find_blocks(model)
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} has no list of layers, and cannot be cut into stages")
    embedding, head = (
        [one] if one is not None else [] for one in (input_embeddings(model), model.get_output_embeddings())
    )
    return [*((names[id(one)], one) for one in embedding), *layers, *((names[id(one)], one) for one in head)]


def owners_of(model: Any, config: DiffusionParallelConfig, max_model_len: int | None = None) -> list[int]:
    """Return the stage of each block. Stages are contiguous and balanced by memory: weights, and the cache of one
    request of `max_model_len` tokens (None: the limit of the model). This minimizes the peak memory over ranks. A
    partition counts layers; the embedding is then in the first stage and the head in the last. The vocabulary may be
    the largest part of a model.

    Raises InputError and UnsupportedError if the configuration does not fit the model.
    """
    check_axes(config)
    blocks, layers = blocks_of(model), {name for name, _ in find_blocks(model)}
    partition = fitting_partition(config, os.environ, len(layers))
    if partition is not None:
        of_layers = [stage for stage, count in enumerate(partition) for _ in range(count)]
        before = next(number for number, (name, _) in enumerate(blocks) if name in layers)
        return [*[0] * before, *of_layers, *[len(partition) - 1] * (len(blocks) - before - len(layers))]
    costs = [float(sum(p.numel() * p.element_size() for p in block.parameters())) for _, block in blocks]
    tokens, first = (
        request_tokens(model.config, max_model_len),
        next(n for n, (name, _) in enumerate(blocks) if name in layers),
    )
    for number, cached in enumerate(cache_bytes(model.config, len(layers), model.dtype.itemsize, tokens), first):
        costs[number] += cached
    cuts = balanced_cuts(costs, config.pipeline_parallel_size)
    return [stage for stage, count in enumerate(cuts) for _ in range(count)]


def cache_of_stages(model: Any, owners: Sequence[int], tokens: int, tensor_ranks: int = 1) -> dict[int, int]:
    """Return the bytes of the cache of one request of `tokens` tokens by stage, on its tensor rank with the most."""
    layers, found = {name for name, _ in find_blocks(model)}, dict.fromkeys(owners, 0)
    stages = [stage for (name, _), stage in zip(blocks_of(model), owners, strict=True) if name in layers]
    cached = cache_bytes(model.config, len(layers), model.dtype.itemsize, tokens, tensor_ranks)
    for stage, count in zip(stages, cached, strict=True):
        found[stage] += count
    return found


@dataclass(frozen=True)
class DecoderLayout:
    """Sharding of a language model. owners: the stage of each block, see `owners_of`. slices: of its linears over
    tensor ranks, None for one rank. notes: modules that stay whole on tensor ranks, with the reasons."""

    owners: list[int]
    slices: TensorPlan | None
    notes: tuple[str, ...] = ()


def lay_out_decoder(model: Any, config: DiffusionParallelConfig, max_model_len: int | None = None) -> DecoderLayout:
    """Decide the sharding of a language model, from shapes alone. max_model_len: see `owners_of`.

    Raises InputError and UnsupportedError if the configuration does not fit the model.
    """
    owners, slices = owners_of(model, config, max_model_len), plan_decoder(model, config.tensor_parallel_size)
    notes = () if slices is None else (describe_replicated(model, slices), *notes_together(slices.notes))
    return DecoderLayout(owners, slices, tuple(filter(None, notes)))


@dataclass(frozen=True)
class Decoder:
    """Record of a sharded language model. stages: None for one stage."""

    name: str
    config: DiffusionParallelConfig
    stages: DecoderStages | None

    def check_config(self, config: DiffusionParallelConfig) -> None:
        """Raise InputError if a second call requests another configuration."""
        if config != self.config:
            raise InputError(
                f"{self.name} is sharded with {self.config}: each rank has only its own part; load it again to "
                "use another configuration"
            )


def shard_decoder(model: Any, runtime: Runtime, layout: DecoderLayout, config: DiffusionParallelConfig) -> None:
    """Shard a causal language model in place: keep this rank's slices of its stage's blocks, and intercept the calls of
    all blocks."""
    add_libraries(FAMILY.libraries)
    blocks, device = blocks_of(model), torch.device(runtime.mesh.device)
    neighbours = Collectives(runtime.mesh.axes["tp"]) if "tp" in runtime.mesh.axes else None
    collected = CollectedOutputs(query_heads(model.config), neighbours)  # before a cut, which may change the number
    if layout.slices is not None:
        for note in layout.notes if runtime.mesh.rank == 0 else ():
            log.warning("%s: %s", type(model).__name__, note)
        cut_model(model, layout.slices, Collectives(runtime.mesh.axes["tp"]), type(model).__name__)
    stages, checks = None, getattr(model, "shardit_checks", None)
    if runtime.mesh.pp_size > 1:
        caches = StageCaches(layout.owners, runtime.comm.rank, [plain_class(block) for _, block in blocks])
        exchange = TensorExchange(runtime.comm, runtime.loop.yield_to_others)
        stages = DecoderStages(model, exchange, blocks, layout.owners, caches, collected)
        drop_blocks(model, blocks, layout.owners, runtime.comm.rank, None)
        stages.install()
    decoder, changes = Decoder(type(model).__name__, config, stages), Changes(model, stages, layout.slices, neighbours)
    members = {
        **members_of(model, stages, runtime, collected, changes),
        **{name: _refused(name, why) for name, why in REFUSED.items() if hasattr(model, name)},
        "state_dict": partial_state_dict(type(model).state_dict, LIBRARIES),
        "device": property(lambda self: device),
        "to": fixed_device_to(type(model).to, device),
        "shardit_decoder": property(lambda self: decoder),
    }
    subclass_in_place(model, members)
    staged = [block for block, _ in blocks] if stages else []
    refuse_partial_states(model, [*staged, *(layout.slices.cuts if layout.slices else ())], LIBRARIES)
    mark_absent(model, device, LIBRARIES)
    for name, part in model.named_modules():
        inside = name and any(block.startswith(f"{name}.") for block, _ in blocks)
        if inside and isinstance(part, PreTrainedModel):  # it may be called directly
            subclass_in_place(part, {"__call__": call_member(type(part), stages, runtime, collected, checks, changes)})


def query_heads(config: Any) -> int:
    """Return the number of query heads of each layer; 0 if it differs between layers, or is not known."""
    text = config.get_text_config(decoder=True)
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    first, *others = (getattr(one, "num_attention_heads", 0) for one in layers)
    return first if isinstance(first, int) and all(number == first for number in others) else 0


def _refused(name: str, why: str) -> Callable[..., None]:
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(f"{name}: {why}")

    return method
