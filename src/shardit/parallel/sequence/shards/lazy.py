"""Lazily gathered tensors: a rank has only its tokens, but the tensor looks whole and is gathered on first use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit.core.comm.collectives import Collectives, even_sizes
from shardit.core.runtime.pending import PendingSource, PendingTensor
from shardit.parallel.sequence.shards.token_dims import Shape, Split, cut


class ShardSource(PendingSource):
    """A whole tensor that is sharded over ranks: the shard of this rank, and the split of the whole.

    Waiting for it gathers it. All ranks run the same program, so all gather it at the same point.
    """

    def __init__(self, shard: torch.Tensor, split: Split, totals: tuple[int, ...], full: Shape, comm: Collectives):
        lengths = tuple(totals[p] for p in split.parts)
        buffer = torch.empty(full, dtype=shard.dtype, device=shard.device)

        def fill() -> None:  # knows nothing of the source: a cycle would keep memory until the garbage collector comes
            with torch.no_grad():
                buffer.copy_(gather(shard, split.dim, lengths, comm))

        super().__init__(fill)
        self.shard, self.split, self.full, self.lengths = shard, split, full, lengths
        self._buffer, self._comm = buffer, comm

    def whole(self) -> torch.Tensor:
        """Return the whole tensor, pending."""
        return self.wrap(self._buffer)

    def is_whole(self, tensor: PendingTensor) -> bool:
        """Return whether a tensor of this source is all of it, and not a view of a part."""
        return bool(self._tensors) and self._tensors[0]() is tensor

    def holds(self, split: Split, totals: Sequence[int]) -> bool:
        """Return whether the shard is the one that `cut` would make."""
        lengths = tuple(totals[p] for p in split.parts)
        return split.order is None and split.dim == self.split.dim and lengths == self.lengths

    def peek(self) -> torch.Tensor:
        """Return the whole tensor, gathered into memory of its own; pending tensors stay pending."""
        return gather(self.shard, self.split.dim, self.lengths, self._comm)


def gather(shard: torch.Tensor, dim: int, lengths: Sequence[int], comm: Collectives) -> torch.Tensor:
    """Gather the whole of a tensor that `cut` has cut at `dim` into streams of these lengths. Collective."""
    own = [even_sizes(length, comm.size)[comm.index] for length in lengths]
    pieces = shard.split(own, dim) if len(own) > 1 else (shard,)
    sizes = [even_sizes(length, comm.size) for length in lengths]
    wholes = [comm.all_gather(piece, size, dim) for piece, size in zip(pieces, sizes, strict=True)]
    return wholes[0] if len(wholes) == 1 else torch.cat(wholes, dim)


MAX_CACHED = 16
"""Shards of arguments that are remembered; each keeps its whole tensor alive."""


@dataclass
class ShardCache:
    """Caches shards of the whole tensors among the arguments of blocks in one forward: most are arguments of every
    block."""

    comm: Collectives
    # Keeps the whole tensor alive so that its id stays unique.
    _made: OrderedDict[Any, tuple[torch.Tensor, int | None, torch.Tensor]] = field(default_factory=OrderedDict)

    def shard_of(self, tensor: torch.Tensor, split: Split, totals: tuple[int, ...], keep: bool) -> torch.Tensor:
        """Return this rank's shard of an argument; no communication if a block has made it. With `keep` it is cached
        for the next block."""
        if isinstance(tensor, PendingTensor):
            source = tensor._source
            if isinstance(source, ShardSource) and source.holds(split, totals) and source.is_whole(tensor):
                return source.shard
            source.wait()
        # Inference tensors have no version counters, so that later writes to them would go unnoticed.
        if not keep or tensor.is_inference():
            return cut(tensor, split, totals, self.comm.index, self.comm.size)
        key = (id(tensor), split.dim, split.order, tuple(totals[p] for p in split.parts))
        known = self._made.get(key)
        if known is None or known[1] != tensor._version:
            shard = cut(tensor, split, totals, self.comm.index, self.comm.size)
            known = self._made[key] = (tensor, tensor._version, shard)
            if len(self._made) > MAX_CACHED:
                self._made.popitem(last=False)
        return known[2]


def batches(shapes: list[Shape | None]) -> tuple[int | None, ...]:
    """Return the numbers of samples in the arguments of a call: a block may relate the samples of larger batches."""
    return tuple(shape[0] if shape else None for shape in shapes)


def full_shape(leaf: Any) -> Shape | None:
    """Return the shape of the whole of an argument, None if it is not a tensor."""
    source = shard_source(leaf)
    if source is not None:
        return source.full
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None


def shard_source(leaf: Any) -> ShardSource | None:
    """Return the source of an argument's shards, if it is the whole output of a block and not gathered yet."""
    if type(leaf) is PendingTensor and isinstance(leaf._source, ShardSource) and leaf._source.is_whole(leaf):
        return leaf._source
    return None
