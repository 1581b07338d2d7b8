"""Memory of the key-value cache of each layer, from the configuration of a model."""

from __future__ import annotations

from typing import Any

from shardit.language.info import max_positions

UNLIMITED = 4096
"""Tokens of a request if neither the user nor the model sets a limit."""

_GROWING = ("full_attention", "hybrid", "indexed_attention", "reference_sliding_attention")
_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding")
"""Types of layers with a cache of keys, by transformers' names."""


def request_tokens(config: Any, max_model_len: int | None) -> int:
    """Return the tokens of the longest request."""
    return max_model_len or max_positions(config) or UNLIMITED


def cache_bytes(config: Any, count: int, itemsize: int, tokens: int, tensor_ranks: int = 1) -> list[int]:
    """Return the bytes of keys and values of each of `count` layers for one request of `tokens` tokens, on the tensor
    rank with the most. 0 for layers whose state does not grow, such as Mamba."""
    text = config.get_text_config(decoder=True)
    kinds = list(getattr(text, "layer_types", None) or ())
    kinds = kinds if len(kinds) == count else ["full_attention"] * count
    try:
        own = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * count
        return [_cached(one, kind, tokens, tensor_ranks) * itemsize for kind, one in zip(kinds, own, strict=True)]
    except (AttributeError, TypeError):  # a family with other names, or lists of numbers
        return [0] * count


def _cached(config: Any, kind: str, tokens: int, tensor_ranks: int) -> int:
    """Return the number of elements that a layer caches for a request."""
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or tokens
    kept = {**dict.fromkeys(_GROWING, tokens), **dict.fromkeys(_WINDOWED, min(tokens, window))}.get(kind, 0)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    latent = getattr(config, "kv_lora_rank", None) is not None  # whole on every tensor rank
    indexer = (getattr(config, "index_head_dim", None) or 0) * kept if kind == "indexed_attention" else 0
    return 2 * (heads if latent else -(-heads // tensor_ranks)) * size * kept + indexer
