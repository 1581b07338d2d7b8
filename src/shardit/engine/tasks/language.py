"""Causal language models as a task: a request is a group of prompts that one `generate` continues."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch

from shardit.core.comm.mesh import Mesh, pick_device
from shardit.core.stages.runtime import Runtime
from shardit.engine.process.memory import held_bytes, limit_bytes
from shardit.errors import InputError, first_line
from shardit.language.batching.batcher import Batcher
from shardit.language.batching.memory import CacheMemory, fitting
from shardit.language.batching.scheduler import BatchLimits
from shardit.language.cache_size import request_tokens
from shardit.language.grammar.token_masks import TokenMasks
from shardit.language.info import LanguageInfo, end_tokens, max_positions
from shardit.language.loading.prepared import PreparedDecoder
from shardit.language.loading.source import decoder_source
from shardit.language.request.defaults import left_out
from shardit.language.request.outputs import GroupOutput
from shardit.language.request.rows import PromptGroup
from shardit.language.sharding import lay_out_decoder, shard_decoder
from shardit.loading.safetensors_file import Reads

if TYPE_CHECKING:
    from shardit.engine.process.messages import SessionSpec


CHUNK = {True: 64, False: 512}
"""Tokens of one prefill on CPUs, and on accelerators: with fewer, reading the weights takes most of the time."""

_checked: list[tuple[SessionSpec, PreparedDecoder]] = []
"""The argument of the last `check`, and the model that it has built on meta, with its tokenizer. A rank that the fork
server forks gets a copy of it, which loading uses up."""


def prepared_for(spec: SessionSpec) -> PreparedDecoder:
    """Return the model of a specification on meta. Raises InputError."""
    return PreparedDecoder(decoder_source(spec.model), spec.dtype, spec.options.lora)


def check(spec: SessionSpec) -> None:
    """Find mistakes before ranks start. Raises InputError. Reads no weights."""
    if spec.device is not None or torch.cuda.is_available():
        pick_device(spec.device, spec.config.world_size - 1, spec.config.transport == "host")
    prepared = prepared_for(spec)
    lay_out_decoder(prepared.module, spec.config, spec.language.max_model_len)
    _ = prepared.tokenizer  # ranks get a copy of it, too
    _checked[:] = [(spec, prepared)]


def load(spec: SessionSpec, mesh: Mesh) -> LoadedDecoder:
    """Load this rank's share of a language model. Collective."""
    return LoadedDecoder(spec, mesh)


class LoadedDecoder:
    """A language model of which this rank holds its share, and its tokenizer."""

    def __init__(self, spec: SessionSpec, mesh: Mesh):
        from transformers import GenerationConfig

        checked, prepared = _checked.pop() if _checked else (None, None)
        prepared = prepared if prepared is not None and checked == spec else prepared_for(spec)
        reads = Reads()
        layout = lay_out_decoder(prepared.module, spec.config, spec.language.max_model_len)
        self.model: Any = prepared.load(layout, mesh.coords, mesh.device, reads)
        self.tokenizer: Any = prepared.tokenizer
        self.runtime = Runtime.of(mesh, spec.max_in_flight, split_batch=False) if len(mesh.replica.ranks) > 1 else None
        if self.runtime is not None:
            shard_decoder(self.model, self.runtime, layout, spec.config)
        limit = limit_bytes(int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size)))
        memory = CacheMemory(self.model, layout.owners, spec.config)
        check_memory(memory, spec, mesh, limit)
        own = self.model.generation_config
        pad = next((one for one in (self.tokenizer.pad_token_id, own.pad_token_id) if one is not None), 0)
        defaults = own.to_diff_dict()
        # Sampling values of the file are defaults of the caller's parameters, and must not count twice.
        self.model.generation_config = GenerationConfig(pad_token_id=pad)
        limits = BatchLimits(
            rows=spec.language.max_num_seqs,
            tokens=spec.language.max_num_batched_tokens or CHUNK[mesh.device.type == "cpu"],
            groups=spec.config.pipeline_parallel_size,
            memory=self._cache_bytes(spec, limit),
        )
        ends = end_tokens(own, self.tokenizer)
        masks = TokenMasks(self.tokenizer, ends)
        self.batcher = Batcher(self.model, self.runtime, limits, memory.row_bytes, ends, pad, self._decode, masks)
        self.info = LanguageInfo(
            max_model_len=fitting(max_positions(self.model.config), limits.memory, memory.row_bytes),
            vocabulary=self.model.config.get_text_config().vocab_size,
            defaults=defaults,
            notes=(*layout.notes, *left_out(defaults)),
            bytes_read=reads.bytes,
            held_bytes=held_bytes(),
            limit_bytes=limit,
        )

    def _cache_bytes(self, spec: SessionSpec, limit: int | None) -> int | None:
        """Return the bytes of all caches on a rank, the same on all ranks of a replica; None without a limit."""
        own = spec.language.kv_cache_memory
        if own is None and limit is not None:
            own = max(limit - held_bytes(), 0) // 2
        if self.runtime is None or own is None:
            return own
        return min(self.runtime.replica.group.gather_objects(own))

    def _decode(self, ids: Any, skip_special: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def error_text(self, request: PromptGroup, error: Exception) -> str:
        """Return an error of a group in one line."""
        text = first_line(error)
        return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"

    def collect(
        self, request: PromptGroup, value: tuple[Any, float, list[str]] | None, error: str | None
    ) -> GroupOutput:
        """Return the output of a group."""
        if value is None:
            return GroupOutput(error=error)
        output, seconds, _ = value
        return dataclasses.replace(output, seconds=seconds)


def check_memory(memory: CacheMemory, spec: SessionSpec, mesh: Mesh, limit: int | None) -> None:
    """Raise InputError if gpu_memory_utilization is given and a rank has no memory for its weights and the cache of one
    request of max_model_len tokens, or if that cache is larger than kv_cache_memory."""
    options = spec.language
    tokens = request_tokens(memory.model.config, options.max_model_len)
    kept = memory.of_stages(tokens + 1)[mesh.pp_rank]  # with a column more, as `fitting` counts
    if options.kv_cache_memory is not None and kept > options.kv_cache_memory:
        raise InputError(
            f"kv_cache_memory={options.kv_cache_memory:,} is too small: rank {mesh.rank} needs {kept:,} bytes for the "
            f"cache of one request of max_model_len={tokens}; raise it, or lower max_model_len"
        )
    own = memory.of_stages(tokens)[mesh.pp_rank]
    if options.gpu_memory_utilization is None or limit is None:
        return
    weights = sum(p.numel() * p.element_size() for p in memory.model.parameters() if not p.is_meta)
    usable = int(options.gpu_memory_utilization * limit)
    if weights + own > usable:
        raise InputError(
            f"rank {mesh.rank} needs {weights:,} bytes for weights and {own:,} for the cache of one request of "
            f"max_model_len={tokens}, and gpu_memory_utilization={options.gpu_memory_utilization:g} of its memory is "
            f"{usable:,}; lower max_model_len, raise gpu_memory_utilization, or use more ranks"
        )
