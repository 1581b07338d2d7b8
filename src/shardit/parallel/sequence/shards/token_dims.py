"""Finds candidates for the token dimensions of a block's arguments from shapes alone, and cuts tensors along them.

A *stream* is an argument that the block returns in the same shape: [batch, tokens, width]. Any other tensor with a
dimension as long as a stream, or as two together, may belong to its tokens (rotary tables, masks, modulation).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shardit.core.comm.collectives import even_sizes

MAX_OF_STREAMS = 48
"""Ways to cut that are tried for one set of streams."""

MAX_CANDIDATES = 96
"""Ways to cut that are tried for one block call."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """The cut of one tensor: dimension `dim` contains the tokens of the streams `parts`, one after the other.

    order: another dimension with the same tokens that stays whole, but in the order of the ranks (the columns of a mask
    whose rows are cut).
    """

    dim: int
    parts: tuple[int, ...]
    order: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to cut the arguments of a block call. streams: leaf numbers of the streams. splits: by leaf, None if it
    stays whole (or is not a tensor)."""

    streams: tuple[int, ...]
    splits: tuple[Split | None, ...]

    def totals(self, shapes: Sequence[Shape | None]) -> tuple[int, ...]:
        """Return the number of tokens of each stream."""
        return tuple(_shape(shapes, q)[token_dim(_shape(shapes, q))] for q in self.streams)

    def fits(self, shapes: Sequence[Shape | None]) -> bool:
        """Return whether arguments of these shapes can be cut like this."""
        if any(shape is None or len(shape) < 2 for shape in (shapes[q] for q in self.streams)):
            return False
        totals = self.totals(shapes)
        for shape, split in zip(shapes, self.splits, strict=True):
            if split is None:
                continue
            if shape is None or shape[split.dim] != sum(totals[p] for p in split.parts):
                return False
        return True

    def pattern(self, shapes: Sequence[Shape | None]) -> tuple[object, ...]:
        """Return the dimensions that could be tokens. If two calls agree in this, a plan that is right for one is right
        for the other: no two lengths coincide by chance in only one of them."""
        totals = self.totals(shapes)
        return tuple(None if shape is None else tuple(_meanings(n, totals) for n in shape) for shape in shapes)


def token_dim(shape: Shape) -> int:
    """Return the token dimension of a stream."""
    return len(shape) - 2


def candidates(shapes: Sequence[Shape | None], outs: Sequence[Shape | None]) -> list[Candidate]:
    """Return ways to cut a block call whose argument leaves and output leaves have these shapes (None: not a tensor),
    the most likely first; empty if no output has the shape of an argument."""
    found: dict[Candidate, None] = {}
    for streams in _stream_sets(shapes, outs):
        totals = tuple(_shape(shapes, q)[token_dim(_shape(shapes, q))] for q in streams)
        by_shape: dict[Shape, list[Split | None]] = {}
        for q, shape in enumerate(shapes):
            if shape is not None and q not in streams:
                by_shape.setdefault(shape, _options(shape, totals))
        for choice in itertools.islice(_likely_first(list(by_shape.values())), MAX_OF_STREAMS):
            chosen = dict(zip(by_shape, choice, strict=True))
            splits: list[Split | None] = [None if shape is None else chosen.get(shape) for shape in shapes]
            for number, q in enumerate(streams):
                splits[q] = Split(token_dim(_shape(shapes, q)), (number,))
            found[Candidate(streams, tuple(splits))] = None
    return list(found)[:MAX_CANDIDATES]


def _likely_first(options: list[list[Split | None]]) -> Iterator[tuple[Split | None, ...]]:
    """Yield ways to choose one of each list, those with the most first choices first: a wrong guess about one argument
    is not combined with all guesses about the others before the next one is tried."""

    def choices(left: list[list[Split | None]], steps: int) -> Iterator[tuple[Split | None, ...]]:
        if not left:
            if not steps:
                yield ()
            return
        first, *rest = left
        reach = sum(len(one) - 1 for one in rest)
        for step in range(max(0, steps - reach), min(steps, len(first) - 1) + 1):
            yield from ((first[step], *others) for others in choices(rest, steps - step))

    for steps in range(sum(len(one) - 1 for one in options) + 1):
        yield from choices(options, steps)


def _stream_sets(shapes: Sequence[Shape | None], outs: Sequence[Shape | None]) -> list[tuple[int, ...]]:
    """Return sets of streams: first arguments that are returned; then also arguments of the same batch and width that
    are not returned, as text in the last block of some models; then those of another width."""
    streams: list[int] = []
    for out in outs:
        same = [q for q, shape in enumerate(shapes) if shape == out and q not in streams]
        if out is not None and len(out) >= 2 and same:
            streams.append(same[0])
    if not streams:
        return []
    like = [(s[0], s[-1], len(s)) for s in (_shape(shapes, q) for q in streams) if len(s) == 3]
    others = [(q, s) for q, s in enumerate(shapes) if s and q not in streams and len(s) == 3]
    alike = [q for q, s in others if (s[0], s[-1], 3) in like]
    wider = [q for q, s in others if q not in alike and s[1] > 1 and any(s[0] == batch for batch, *_ in like)]
    extra = [subset for n in range(len(alike) + 1) for subset in itertools.combinations(alike, n)]
    return [*((*streams, *subset) for subset in extra[:8]), *((*streams, q) for q in wider[:4])]


def _options(shape: Shape, totals: tuple[int, ...]) -> list[Split | None]:
    options: list[Split | None] = []
    dims = list(range(len(shape)))
    if len(dims) > 2:  # after the batch, before it
        dims = [1, *(d for d in dims if d != 1)]
    if len(dims) >= 2 and shape[-1] == shape[-2]:
        rows, columns = len(shape) - 2, len(shape) - 1
        options += [Split(rows, parts, columns) for parts in _meanings(shape[-1], totals)]
    found = [Split(dim, parts) for dim in dims for parts in _meanings(shape[dim], totals)]
    # Columns of a mask have one row, or the rows of a stream. Other last dimensions are a width with the same number.
    columns = len(dims) < 3 or shape[-2] == 1 or any(split.dim == len(shape) - 2 for split in found)
    likely = [split for split in found if columns or split.dim != len(shape) - 1]
    return [*options, *likely, None, *(split for split in found if split not in likely)]


def _meanings(length: int, totals: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the streams, alone or two in a row, with this length."""
    numbers = range(len(totals))
    alone = [(a,) for a in numbers if totals[a] == length]
    pairs = [(a, b) for a, b in itertools.permutations(numbers, 2) if totals[a] + totals[b] == length]
    return tuple(alone + pairs)


def _shape(shapes: Sequence[Shape | None], q: int) -> Shape:
    shape = shapes[q]
    assert shape is not None
    return shape


def out_options(out: Shape, totals: tuple[int, ...]) -> list[Split | None]:
    """Return the possible splits of an output, the most likely first."""
    return _options(out, totals)


def local_shape(full: Shape, split: Split | None, totals: Sequence[int], rank: int, size: int) -> Shape:
    """Return the shape of rank `rank`'s shard."""
    if split is None:
        return full
    length = sum(even_sizes(totals[p], size)[rank] for p in split.parts)
    return (*full[: split.dim], length, *full[split.dim + 1 :])


def cut(tensor: torch.Tensor, split: Split, totals: Sequence[int], rank: int, size: int) -> torch.Tensor:
    """Cut rank `rank`'s shard from a whole tensor: a view if possible, dense if the whole is."""
    runs = _runs(split.parts, totals, size)
    pieces = [tensor.narrow(split.dim, *run) for run in runs[rank]]
    shard = pieces[0] if len(pieces) == 1 else torch.cat(pieces, split.dim)
    if split.order is not None and len(split.parts) > 1:
        columns = [shard.narrow(split.order, *run) for of_rank in runs for run in of_rank]
        shard = torch.cat(columns, split.order)
    # Of one sample, the view has the strides of the whole: compiled code would be made again for the outputs of blocks.
    return shard.contiguous().flatten().view(shard.shape) if tensor.is_contiguous() else shard


def _runs(parts: tuple[int, ...], totals: Sequence[int], size: int) -> list[list[tuple[int, int]]]:
    """Return for each rank the (start, length) of its tokens of each part."""
    out: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    base = 0
    for part in parts:
        start = base
        for rank, length in enumerate(even_sizes(totals[part], size)):
            out[rank].append((start, length))
            start += length
        base += totals[part]
    return out
