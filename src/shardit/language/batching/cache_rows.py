"""Rows of caches: they join a batch and leave it. Keys of all rows end in one column, with padding on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from shardit.language.caches import is_stand_in

KNOWN = (
    *(DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer),
    *(LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer),
)
"""Classes of cache layers whose rows can join and leave."""


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
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for states, others in (
                (layer.conv_states, more.conv_states),
                (layer.recurrent_states, more.recurrent_states),
            ):
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
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for states in (layer.conv_states, layer.recurrent_states):
                for number, state in states.items():
                    if state is not None:
                        states[number] = state.index_select(0, torch.tensor(rows, device=state.device))


def kept_columns(layer: Any, columns: int) -> int:
    """Return how many of the last columns a layer keeps."""
    return min(columns, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else columns


def _aligned(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return the last `count` columns, with zeros on the left where there are fewer."""
    missing = count - keys.shape[-2]
    return F.pad(keys, (0, 0, missing, 0)) if missing >= 0 else keys[..., -missing:, :]


def _device(layer: Any) -> torch.device:
    return layer.keys.device


def _set_length(layer: Any, columns: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = columns
