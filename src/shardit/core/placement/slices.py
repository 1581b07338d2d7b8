"""The part of a tensor on a rank, if the tensor is cut over several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Segments = tuple[tuple[int, int], ...]
"""(start, length) pairs along one dimension, in the order in which they lie in the slice."""


@dataclass(frozen=True)
class Slice:
    """The part of a tensor that one rank holds: some segments of dimension `dim`, one after the other."""

    dim: int
    segments: Segments

    @property
    def length(self) -> int:
        """Length of the slice along `dim`."""
        return sum(length for _, length in self.segments)

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the slice of a tensor of shape `full`."""
        return (*full[: self.dim], self.length, *full[self.dim + 1 :])

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the slice of a whole tensor, in memory of its own."""
        import torch

        parts = [tensor.narrow(self.dim, start, length) for start, length in self.segments]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)

    def pairs(self, whole: torch.Tensor, part: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each segment as a view of a whole tensor and of its slice."""
        at = 0
        for start, length in self.segments:
            yield whole.narrow(self.dim, start, length), part.narrow(self.dim, at, length)
            at += length


Owned = Callable[[str], "bool | Slice"]
"""The part of a named tensor on a rank: all, nothing, or a slice."""


@dataclass(frozen=True)
class Shards:
    """The cut of a tensor along `dim`, of length `total`: ranks[i] are the segments of rank i."""

    dim: int
    total: int
    ranks: tuple[Segments, ...]

    def of(self, rank: int) -> Slice:
        """Return the slice of one rank."""
        return Slice(self.dim, self.ranks[rank])

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of each rank's slice."""
        return tuple(self.of(rank).length for rank in range(len(self.ranks)))

    @property
    def copied(self) -> bool:
        """Whether ranks have copies of parts, or one rank has a part twice."""
        return sum(self.lengths) > self.total

    def first_runs(self, rank: int) -> list[tuple[int, int]]:
        """Return the runs of a rank's slice, as (start in the slice, length), that neither an earlier rank has, nor the
        slice itself further up."""
        known = {at for one in self.ranks[:rank] for start, length in one for at in range(start, start + length)}
        runs: list[tuple[int, int]] = []
        place = 0
        for start, length in self.ranks[rank]:
            for at in range(start, start + length):
                if at not in known:
                    begin, count = runs.pop() if runs and sum(runs[-1]) == place else (place, 0)
                    runs.append((begin, count + 1))
                    known.add(at)
                place += 1
        return runs

    @property
    def everywhere(self) -> bool:
        """Whether every rank has all of it."""
        return all(length == self.total for length in self.lengths)


Parts = int | tuple[float, ...]
"""Into how many parts something is cut, of equal size; or the sizes of the parts, in relation to each other."""


def even(total: int, parts: Parts, dim: int = 0, unit: int = 1) -> Shards:
    """One run of dimension `dim` for each rank; runs begin at multiples of `unit`, and differ by one unit at most
    (from the given sizes, if `parts` are sizes)."""
    return shards(dim, total, [even_runs(total // unit, parts, unit)])


def even_runs(count: int, parts: Parts, unit: int = 1, offset: int = 0) -> list[tuple[int, int]]:
    """`count` units of `unit` elements, distributed over `parts` in order: (start, length) for each, from `offset`
    on."""
    lengths = [n * unit for n in (_equal(count, parts) if isinstance(parts, int) else _in_proportion(count, parts))]
    return list(zip(accumulate(lengths[:-1], initial=offset), lengths, strict=True))


def _equal(count: int, parts: int) -> list[int]:
    least, more = divmod(count, parts)
    return [least + (i < more) for i in range(parts)]


def _in_proportion(count: int, shares: tuple[float, ...]) -> list[int]:
    """Whole numbers in proportion to the shares, at least one each as long as there are enough."""
    least = 1 if count >= len(shares) else 0
    wanted = [share / sum(shares) * count for share in shares]
    numbers = [max(least, int(number)) for number in wanted]
    while (left := count - sum(numbers)) != 0:
        step = 1 if left > 0 else -1
        able = [i for i, number in enumerate(numbers) if number + step >= least]
        numbers[max(able, key=lambda i: step * (wanted[i] - numbers[i]))] += step
    return numbers


def shards(dim: int, total: int, runs: Sequence[Sequence[tuple[int, int]]]) -> Shards:
    """Shards in which each rank has its own run of each of several parts of a tensor (the halves of a gate, say)."""
    return Shards(dim, total, tuple(zip(*runs, strict=True)))


def one_behind_the_other(*cuts: Shards) -> Shards:
    """Return the cut of the tensor that consists of these parts, along their dimension."""
    starts = list(accumulate((cut.total for cut in cuts), initial=0))
    ranks = [
        tuple((start + at, length) for start, cut in zip(starts, cuts, strict=False) for at, length in cut.ranks[rank])
        for rank in range(len(cuts[0].ranks))
    ]
    return Shards(cuts[0].dim, starts[-1], tuple(ranks))
