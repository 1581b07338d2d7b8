"""Memory of the caches of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from shardit.config import DiffusionParallelConfig
from shardit.language.sharding import cache_of_stages


class CacheMemory:
    """Bytes of the cache of a row. owners: the stage of each block, see `owners_of`."""

    def __init__(self, model: Any, owners: Sequence[int], config: DiffusionParallelConfig):
        self.model, self._owners, self._slices = model, owners, config.tensor_parallel_size
        self.row_bytes = functools.lru_cache(maxsize=65536)(self._row_bytes)

    def of_stages(self, columns: int) -> dict[int, int]:
        """Return the bytes of a row with a number of columns, by stage, on its tensor rank with the most."""
        return cache_of_stages(self.model, self._owners, columns, self._slices)

    def _row_bytes(self, columns: int) -> int:
        return max(self.of_stages(columns).values())


def fitting(limit: int | None, memory: int | None, row_bytes: Callable[[int], int]) -> int | None:
    """Return the most tokens of a request: `limit`, or fewer if the memory of caches has no room for these. None for a
    model without a limit, whose requests must give their numbers."""
    if memory is None or limit is None or row_bytes(limit + 1) <= memory:
        return limit
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if row_bytes(middle + 1) <= memory else (low, middle - 1)
    return low
