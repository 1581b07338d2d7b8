"""Keys and values of earlier texts, for prompts that begin alike: only the rest of such a prompt is computed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from shardit.language.caches import add_delegates, delegates, is_stand_in

SHORTEST = 32
"""Tokens of the shortest prefix that is reused; computing fewer costs less than the copies."""

ENTRIES = 64
"""Maximum number of texts kept."""


class PrefixStore:
    """The caches of texts by their tokens, least recently used first. All ranks decide from tokens, so alike.

    row_bytes: see `Scheduler`. longest: tokens of the longest text that is kept.
    """

    def __init__(self, row_bytes: Callable[[int], int], longest: int):
        self._row_bytes, self.longest = row_bytes, longest
        self.hits = self.reused_tokens = 0
        """Prompts that began with kept keys, and how many of their tokens these were."""
        self._entries: OrderedDict[tuple[int, ...], tuple[list[Any], Any]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Bytes of all texts."""
        return sum(self._row_bytes(len(tokens)) for tokens in self._entries)

    def shrink(self, limit: int) -> None:
        """Forget texts until the others have at most `limit` bytes."""
        while self._entries and self.bytes > limit:
            self._entries.popitem(last=False)

    def add(self, tokens: tuple[int, ...], cache: Any, row: int) -> None:
        """Keep the cache of a row of a batch, which ends with `tokens`. A text that it continues is forgotten."""
        if not SHORTEST <= len(tokens) <= self.longest:
            return
        for other in [one for one in self._entries if tokens[: len(one)] == one]:
            del self._entries[other]
        if any(one[: len(tokens)] == tokens for one in self._entries):
            return
        layers = [None if is_stand_in(layer) else _row_of(layer, row, len(tokens)) for layer in cache.layers]
        self._entries[tokens] = layers, delegates(cache)
        if len(self._entries) > ENTRIES:
            self._entries.popitem(last=False)

    def length(self, tokens: tuple[int, ...]) -> int:
        """Return how many tokens of a prompt are known; the last one is always computed. 0 for fewer than
        `SHORTEST`."""
        return max((_common(one, tokens) for one in self._entries), default=0)

    def fill(self, cache: Any, tokens: tuple[int, ...], length: int) -> None:
        """Put the known tokens of a prompt into a new cache."""
        found = next(one for one in self._entries if _common(one, tokens) == length)
        self._entries.move_to_end(found)
        self.hits, self.reused_tokens = self.hits + 1, self.reused_tokens + length
        layers, others = self._entries[found]
        cache.layers[:] = [
            one if layer is None else _cut(layer, length) for one, layer in zip(cache.layers, layers, strict=True)
        ]
        add_delegates(cache, others)


def longest_storable(cache: Any) -> int:
    """Return the tokens of the longest text of which a new cache will have all keys, so that heads of it can be taken:
    fewer than its shortest window, 0 with states of linear attention. The same on all ranks."""
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return 0
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return min(windows, default=1 << 60) - 1


def _common(known: tuple[int, ...], tokens: tuple[int, ...]) -> int:
    most = min(len(known), len(tokens) - 1)
    if most < SHORTEST or known[:SHORTEST] != tokens[:SHORTEST]:
        return 0
    return next((n for n in range(SHORTEST, most) if known[n] != tokens[n]), most)


def _row_of(layer: Any, row: int, length: int) -> Any:
    out = copy.copy(layer)
    if not layer.is_initialized:
        return out
    out.keys = layer.keys[row : row + 1, :, -length:].clone()
    out.values = layer.values[row : row + 1, :, -length:].clone()
    return out


def _cut(layer: Any, length: int) -> Any:
    out = copy.copy(layer)
    if not layer.is_initialized:
        return out
    out.keys, out.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    if isinstance(out, DynamicSlidingWindowLayer):
        out.cumulative_length = length
    return out
