"""Finds by trial how the ranks can share the calls of a module: on which rows of its arguments it gives the same as on
all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shardit.core.comm.collectives import even_sizes
from shardit.errors import RankError
from shardit.parallel.compare import close
from shardit.parallel.sequence.partitioned.modules import Arguments
from shardit.parallel.sequence.partitioned.run import CHANNELS, Rows, is_plain_convolution, some_channels
from shardit.parallel.sequence.partitioned.sums import (
    Shapes,
    contractions,
    shapes_noted,
    sums_of,
    values_given,
    values_kept,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

REPEATED = 0.25
"""Share of the multiplications of a module that may be repeated on every rank (halos, keys of text)."""


@dataclass
class ModuleTrial:
    """A call of a module, to be tried on rows for each of `size` ranks. multiplications: counts all of them so far."""

    module: nn.Module
    call: Callable[..., Any]
    given: Arguments
    size: int
    multiplications: Callable[[], int]

    def run(self) -> Any:
        """Run the call on all rows."""
        before = self.multiplications()
        with shapes_noted() as self._shapes:
            self._out = self._called(self.given.tensors)
        self._cost = self.multiplications() - before
        return self._out

    def find(self) -> tuple[Rows, int] | None:
        """Return rows on which the call gives the same, and how many multiplications the ranks then share; None if
        there are none."""
        for rows in ways(self.module, self.given.tensors, self._out, self.size):
            try:
                found = self._same(rows)
            except (RankError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # a module that cannot take such rows may raise any exception
                continue
            if found is not None:
                return found
        return None

    def _same(self, rows: Rows) -> tuple[Rows, int] | None:
        if rows.dim == CHANNELS:
            return (rows, self._cost) if self._same_by_channels() else None
        total = rows.count(self.given.tensors)
        assert total is not None
        sizes = even_sizes(total, self.size)
        before = self.multiplications()
        with shapes_noted() as shapes:
            first = self._called(rows.of_rank(self.given.tensors, sizes, 0))
        if not self._right(rows, sizes, 0, first):
            return None if rows.halo else self._with_sums(rows, sizes, shapes)
        others = range(1, self.size)
        if not all(self._right(rows, sizes, rank, self._on_rows(rows, sizes, rank)) for rank in others):
            return None
        return self._worth(rows, self.multiplications() - before)

    def _with_sums(self, rows: Rows, sizes: list[int], shapes: Shapes) -> tuple[Rows, int] | None:
        """Try whether results that do not depend on the number of rows are sums over the parts."""
        sites = contractions(self._shapes, shapes)
        if not sites:
            return None
        with values_kept(sites) as values:
            self._called(self.given.tensors)
        found, before = [], self.multiplications()
        for rank in range(self.size):
            with values_given(values) as own:
                out = self._on_rows(rows, sizes, rank)
            if not self._right(rows, sizes, rank, out):
                return None
            found.append(own)
        sums = sums_of(values, found, sizes)
        return None if sums is None else self._worth(replace(rows, sums=sums), self.multiplications() - before)

    def _worth(self, rows: Rows, of_parts: int) -> tuple[Rows, int] | None:
        """Return the rows and the multiplications that are shared, unless too many are repeated: all parts together
        take `of_parts`."""
        repeated = (of_parts - self._cost) // (self.size - 1)
        return None if repeated > REPEATED * self._cost else (rows, self._cost - max(0, repeated))

    def _right(self, rows: Rows, sizes: list[int], rank: int, out: Any) -> bool:
        own = rows.without_halo(out, sizes, rank)
        return close(self._out.narrow(rows.dim, sum(sizes[:rank]), sizes[rank]), own)

    def _same_by_channels(self) -> bool:
        module, (given,) = self.module, self.given.tensors
        assert is_plain_convolution(module)
        sizes = even_sizes(module.out_channels, self.size)
        outs = [some_channels(module, given, sizes, rank) for rank in range(self.size)]
        return close(self._out, torch.cat(outs, 1))

    def _on_rows(self, rows: Rows, sizes: list[int], rank: int) -> Any:
        return self._called(rows.of_rank(self.given.tensors, sizes, rank))

    def _called(self, tensors: Sequence[torch.Tensor]) -> Any:
        args, kwargs = self.given.with_tensors([t.clone() for t in tensors])
        return self.call(*args, **kwargs)


def ways(module: nn.Module, tensors: Sequence[torch.Tensor], out: Any, size: int) -> Iterator[Rows]:
    """Yield how the ranks could share the calls of a module with these tensors, the most likely first."""
    first, plain = tensors[0], []
    for dim in likely_dims(module, first, out, size):
        if dim != CHANNELS:
            plain += _with_others(tensors, dim)
        elif len(tensors) == 1:
            plain.append(Rows(((first.ndim, CHANNELS),)))
    yield from plain
    if isinstance(module, CONVOLUTIONS):  # alone it goes by channels, or is too little for a message
        return
    reach = _reach(module)
    longest = sorted((r for r in plain if r.dim > 0), key=lambda r: first.shape[r.dim], reverse=True)
    for rows in longest:
        for halo in sorted({min(1, reach), reach} - {0}):
            if first.shape[rows.dim] // size > halo:
                yield replace(rows, halo=halo)


def _with_others(tensors: Sequence[torch.Tensor], dim: int) -> list[Rows]:
    """Return the rows of dimension `dim` of the first tensor, with those of all others that have as many; and with all
    others whole."""
    first, *others = tensors
    length = first.shape[dim]
    cuts: list[int | None] = []
    for other in others:
        same = [d for d, n in enumerate(other.shape) if n == length]
        cuts.append(dim if dim in same else same[0] if same else None)
    found = [Rows(((first.ndim, dim), *((t.ndim, cut) for t, cut in zip(others, cuts, strict=True))))]
    if any(cut is not None for cut in cuts):
        found.append(Rows(((first.ndim, dim), *((t.ndim, None) for t in others))))
    return found


def _reach(module: nn.Module) -> int:
    """Return how many rows on either side a result can depend on, at most, through the convolutions of a module."""
    found = 0
    for part in module.modules():
        if isinstance(part, CONVOLUTIONS):
            found += max(math.ceil(d * (k - 1) / 2) for d, k in zip(part.dilation, part.kernel_size, strict=True))
    return found


def likely_dims(module: nn.Module, given: torch.Tensor, out: Any, size: int) -> list[int]:
    """Return the dimensions of a module's argument that could be rows of their own, the most likely first; the batch,
    which may be one sample in other calls, is the last."""
    if not isinstance(out, torch.Tensor) or out.ndim != given.ndim or given.ndim < 2:
        return []
    order = [given.ndim - 2, *range(1, given.ndim - 2), given.ndim - 1, 0]
    found = [d for d in dict.fromkeys(order) if given.shape[d] == out.shape[d] and given.shape[d] >= size]
    if is_plain_convolution(module) and given.ndim == module.weight.ndim and module.out_channels >= size:
        found.insert(len(found) - 1 if 0 in found else len(found), CHANNELS)
    return found
