"""One running forward of a transformer whose tokens are sharded by a found plan."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit.parallel.sequence.found.small_lists import ListWork
from shardit.parallel.sequence.shards.lazy import ShardCache, ShardSource
from shardit.parallel.sequence.shards.token_dims import Shape, Split


@dataclass
class Flow:
    """One running forward: shards of the arguments of its blocks. numbers: the kind of the numbers that it is given.
    work: what it has computed so far."""

    owner: Any
    cache: ShardCache
    numbers: Any
    in_block: bool = False
    work: ListWork = field(default_factory=ListWork)
    _parts: dict[int, tuple[Callable[[], Any], Callable[[torch.Tensor], torch.Tensor]]] = field(default_factory=dict)

    def note(self, part: torch.Tensor, split: Split, totals: tuple[int, ...], full: Shape) -> None:
        """Remember a shard that hooks on a block see, without keeping it alive."""
        comm = self.cache.comm
        self._parts[id(part)] = weakref.ref(part), lambda shard: ShardSource(shard, split, totals, full, comm).whole()

    def whole(self, leaf: Any) -> Any:
        """Return the whole of a shard that hooks may have collected, anything else as it is."""
        alive, gathered = self._parts.get(id(leaf), (None, None))
        return gathered(leaf) if alive is not None and gathered is not None and alive() is leaf else leaf
