"""Checks a language model and the arguments of `LLM` by its files alone, before torch is imported and ranks start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardit.config import DiffusionParallelConfig, fitting_partition
from shardit.core.modules.block_names import count_blocks
from shardit.core.placement.head_counts import check_query_heads
from shardit.errors import InputError
from shardit.language.info import LanguageInfo
from shardit.language.limits import POSITION_LIMITS, check_axes, check_max_model_len
from shardit.language.loading.adapter import check_base, open_adapter
from shardit.language.loading.gguf_header import read_values
from shardit.language.loading.source import DecoderSource, read_config
from shardit.loading.checkpoint import Checkpoint
from shardit.settings.lora import Lora
from shardit.settings.model_options import NO_OPTIONS, ModelOptions

_PLAIN = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3")
_PLAIN = (*_PLAIN, "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen2moe", "qwen3moe")
"""Families, under their names in config.json and in GGUF files, all of whose layers have attention with one linear each
for queries, keys and values, and the numbers of heads that the configuration states."""


_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class _Numbers:
    """Data of a model from its files; None if they lack it, or other parts of the model may differ."""

    model: str
    positions: int | None = None
    layers: int | None = None
    heads: int | None = None
    key_heads: int | None = None


def check_decoder_options(model: Any, given: Mapping[str, Any], options: ModelOptions) -> None:
    """Raise InputError for options that only pipelines of diffusers have."""
    own = {**given, **vars(options)}
    plain = {**dict.fromkeys(given), **vars(NO_OPTIONS), "lora": options.lora}
    wrong = next((name for name, value in own.items() if value != plain[name]), None)
    if wrong is not None:
        raise InputError(f"{wrong}: {model} holds a language model, which takes none; leave it out")


def check_decoder(
    source: DecoderSource,
    config: DiffusionParallelConfig,
    max_model_len: int | None,
    loras: Sequence[Lora] = (),
    weights: bool = True,
) -> None:
    """Raise InputError or UnsupportedError for what the files of a model and of its adapters show. What they do not
    show is found when the model is built. weights: whether the model needs its weights."""
    check_axes(config)
    found = _of_config(source, weights) if source.gguf is None else _of_gguf(source)
    check_max_model_len(max_model_len, found.positions)
    for lora in loras:
        check_base(open_adapter(lora), source)
    if found.layers:
        fitting_partition(config, os.environ, found.layers)
    if found.heads:
        check_query_heads(config.tensor_parallel_size, found.model, found.heads, found.key_heads or found.heads)


def info_of_files(source: DecoderSource) -> LanguageInfo | None:
    """Return what requests are checked by, before ranks have loaded the model; None if its files do not state all of
    it."""
    if source.gguf is not None or not (source.folder / _GENERATION).is_file():
        return None
    own, vocabulary = _of_config(source), read_config(source.folder).get("vocab_size")
    if own.positions is None or not isinstance(vocabulary, int):
        return None
    return LanguageInfo(own.positions, vocabulary, read_config(source.folder, _GENERATION))


def _of_config(source: DecoderSource, weights: bool = True) -> _Numbers:
    own = read_config(source.folder)
    name = str(source.architecture or own.get("model_type"))
    if "text_config" in own:  # a model of several parts
        return _Numbers(name)
    numbers = {name: value for name, value in own.items() if isinstance(value, int) and value > 0}
    plain = own.get("model_type") in _PLAIN
    layers = numbers.get("num_hidden_layers") if plain else None
    if source.remote is None and weights:
        layers = _layers_of_files(source)
    positions = next((numbers[one] for one in POSITION_LIMITS if one in numbers), None)
    heads = numbers.get("num_attention_heads") if plain else None
    return _Numbers(name, positions, layers, heads, numbers.get("num_key_value_heads"))


def _layers_of_files(source: DecoderSource) -> int | None:
    """Return the number of layers of a folder with weights, whose headers are checked."""
    checkpoint = Checkpoint.open(source.folder)
    for file in checkpoint.names:
        checkpoint.header(file)
    return count_blocks({name: checkpoint.entry(name).shape for name in checkpoint.files})


def _of_gguf(source: DecoderSource) -> _Numbers:
    found = read_values(source.folder / str(source.gguf))
    name = str(found.get("general.architecture"))
    own = {key.removeprefix(f"{name}."): value for key, value in found.items() if isinstance(value, int)}
    positions, layers = own.get("context_length"), own.get("block_count")
    heads = own.get("attention.head_count") if name in _PLAIN else None
    return _Numbers(name, positions, layers, heads, own.get("attention.head_count_kv"))
