"""Rows of a tensor on each rank, some of them on all ranks, some of them padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardit.core.comm.collectives import Collectives, even_sizes

Runs = tuple[tuple[int, int], ...]
"""(start, length) pairs, in order."""


@dataclass(frozen=True)
class TokenRows:
    """The rows (tokens) over the ranks of one tensor with `whole` rows in total.

    local: rows on this rank. own: the rows that it contributes, so that all ranks together have each row once. lens:
    number of rows that each rank contributes. shared: rows on every rank (unsplit text, for example): they are
    partitioned over the ranks, and `front` of them stand before the split ones. All other local rows are padding.
    everywhere: every rank has the whole tensor.
    """

    local: int
    whole: int
    lens: tuple[int, ...] = ()
    own: Runs = ()
    shared: Runs = ()
    front: int = 0
    everywhere: bool = False

    def take(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the rows that this rank contributes; the tensor itself if these are all rows."""
        return take(tensor, self.own, dim)

    def put(self, rows: torch.Tensor, comm: Collectives, blank: float) -> torch.Tensor:
        """Expand results for own rows (dimension 1) to all local ones: shared rows come from the rank to which they
        were partitioned, padding is `blank`."""
        if self.own == ((0, self.local),):
            return rows
        full = rows.new_full((rows.shape[0], self.local, *rows.shape[2:]), blank)
        place(full, self.own, rows)
        if self.shared:
            partitioned = even_sizes(_count(self.shared), comm.size)
            mine = take(full, self._partitioned(partitioned, comm.index), 1)
            place(full, self.shared, comm.all_gather(mine, partitioned, 1))
        return full

    def _partitioned(self, partitioned: Sequence[int], rank: int) -> Runs:
        indices = _indices(self.shared)
        start = sum(partitioned[:rank])
        return runs_of(indices[start : start + partitioned[rank]])

    def natural(self, rank: int) -> list[int]:
        """Return the places in the whole tensor of the rows that a rank contributes. The split rows are assumed to be
        one sequence: several sequences are concatenated by rank, which would show as a wrong result."""
        shared, size = _count(self.shared), len(self.lens)
        partitioned = even_sizes(shared, size)
        split = [n - d for n, d in zip(self.lens, partitioned, strict=True)]
        start, first = sum(partitioned[:rank]), self.front + sum(split[:rank])
        places = [i if i < self.front else self.whole - shared + i for i in range(start, start + partitioned[rank])]
        return sorted([*places, *range(first, first + split[rank])])


def partitioned_rows(
    here: int, whole: int, real: Sequence[int], counts: Sequence[int], shared: tuple[int, int], rank: int
) -> TokenRows:
    """Return the rows of a tensor with `counts[rank]` rows without padding on each rank; `real`: their indices on this
    rank.

    shared: number of shared rows at the front and at the back.
    """
    front, back = shared
    size = len(counts)
    both = [*real[:front], *real[len(real) - back :]]
    partitioned = even_sizes(front + back, size)
    start = sum(partitioned[:rank])
    own = sorted([*both[start : start + partitioned[rank]], *real[front : len(real) - back]])
    lens = tuple(n - front - back + d for n, d in zip(counts, partitioned, strict=True))
    return TokenRows(here, whole, lens, runs_of(own), runs_of(both), front)


def runs_of(indices: Sequence[int]) -> Runs:
    """Group neighbouring indices into runs."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return tuple(runs)


def take(tensor: torch.Tensor, runs: Runs, dim: int) -> torch.Tensor:
    """Return these rows of a tensor: the tensor itself, a view, or for several runs a copy."""
    if runs == ((0, tensor.shape[dim]),):
        return tensor
    pieces = [tensor.narrow(dim, *run) for run in runs] or [tensor.narrow(dim, 0, 0)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def place(tensor: torch.Tensor, runs: Runs, rows: torch.Tensor) -> None:
    """Write rows to these places along dimension 1."""
    starts = itertools.accumulate((length for _, length in runs), initial=0)
    for (start, length), at in zip(runs, starts, strict=False):
        tensor.narrow(1, start, length).copy_(rows.narrow(1, at, length))


def _indices(runs: Runs) -> list[int]:
    return [i for start, length in runs for i in range(start, start + length)]


def _count(runs: Runs) -> int:
    return sum(length for _, length in runs)
