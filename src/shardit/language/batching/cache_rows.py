"""Rows of caches: they join a batch and leave it. Keys of all rows end in one column, with padding on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from shardit.language.caches import is_stand_in

KNOWN = (
    *(DynamicLayer, DynamicIndexedLayer, DynamicSlidingWindowLayer, LinearAttentionLayer),
    *(LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer),
)
"""Classes of cache layers whose rows can join and leave."""


INDEXED = {"indexer_keys": (0, 1), "indexer_position_ids": (1, 2)}
"""Further tensors of `DynamicIndexedLayer`, with their dimensions of rows and of columns."""


def can_join(cache: Any) -> bool:
    """Return whether rows of a new cache can join and leave."""
    if not isinstance(cache, Cache) or cache.layer_class_to_replicate not in (None, *KNOWN):
        return False
    return all(type(layer) in KNOWN for layer in cache.layers)


def join(cache: Any, other: Any, columns: int) -> None:
    """Append the rows of another cache, in place. columns: of the result."""
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if is_stand_in(layer):
            continue
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            count = kept_columns(layer, columns)
            for name in ("keys", "values"):
                setattr(layer, name, torch.cat([_aligned(getattr(one, name), count) for one in (layer, more)]))
            _set_length(layer, columns)
            for name, (dim, at) in INDEXED.items():
                if getattr(layer, name, None) is not None:
                    parts = [_aligned(getattr(one, name), columns, at) for one in (layer, more)]
                    setattr(layer, name, torch.cat(parts, dim))
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for name in ("conv_states", "recurrent_states"):
                states, others = getattr(layer, name), getattr(more, name)
                for number, state in states.items():
                    if state is not None:
                        states[number] = torch.cat([state, others[number]])


def keep_rows(cache: Any, rows: Sequence[int], columns: int) -> None:
    """Remove all but some rows of a cache, in place. columns: of the result, at most those of the cache."""
    for layer in cache.layers:
        if is_stand_in(layer):
            continue
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            chosen, count = torch.tensor(rows, device=_device(layer)), kept_columns(layer, columns)
            for name in ("keys", "values"):
                setattr(layer, name, _aligned(getattr(layer, name), count).index_select(0, chosen))
            _set_length(layer, columns)
            for name, (dim, at) in INDEXED.items():
                if getattr(layer, name, None) is not None:
                    setattr(layer, name, _aligned(getattr(layer, name), columns, at).index_select(dim, chosen))
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for states in (layer.conv_states, layer.recurrent_states):
                for number, state in states.items():
                    if state is not None:
                        states[number] = state.index_select(0, torch.tensor(rows, device=state.device))


def kept_columns(layer: Any, columns: int) -> int:
    """Return how many of the last columns a layer keeps."""
    return min(columns, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else columns


def _aligned(keys: torch.Tensor, count: int, dim: int = 2) -> torch.Tensor:
    """Return the last `count` columns, which are along `dim`, with zeros on the left if there are fewer."""
    missing = count - keys.shape[dim]
    if missing < 0:
        return keys.narrow(dim, -missing, count)
    return F.pad(keys, (0, 0) * (keys.ndim - 1 - dim) + (missing, 0))


def _device(layer: Any) -> torch.device:
    return layer.keys.device


def _set_length(layer: Any, columns: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = columns
