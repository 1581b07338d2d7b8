"""Sums over the ranks in a module of which each rank runs its own rows.

An operation that contracts the rows (keys times values in linear attention, a sum or a mean over tokens) gives on some
rows a part of what it gives on all of them. Such operations are found by trial: their result has the same shape on
some rows as on all, and the results of the parts add up. So linear attention is known by what it computes, for any
class: its state, [heads, width, width], is all that the ranks exchange.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardit.core.comm.collectives import Collectives
from shardit.core.runtime.storages import tensors_of
from shardit.errors import RankError
from shardit.parallel.compare import close

Site = tuple[str, int]
"""An operation in a call of a module: its name, and how many of that name come before it."""

Shapes = Mapping[Site, tuple[list[torch.Size], torch.Size]]
"""The shapes of the arguments and of the result of each operation."""

WITHOUT_VALUES = ("aten::new_empty", "aten::new_empty_strided")
"""Operations whose result has no values yet."""


@dataclass(frozen=True)
class RowSum:
    """An operation whose results on the rows of each rank add up. mean: after each is weighted by its share of the
    rows. shape: of the result, which does not depend on the number of rows."""

    mean: bool
    shape: tuple[int, ...]


Sums = Mapping[Site, RowSum]


class Operations(TorchDispatchMode):
    """Calls `each(site, args, out)` after every operation that makes a tensor, and goes on with what it returns."""

    def __init__(self, each: Callable[[Site, Any, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.supports_higher_order_operators = True
        self._each, self._seen = each, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name() if isinstance(func, torch._ops.OpOverload) else str(func)
        site = (name, self._seen[name])
        self._seen[name] += 1
        return self._each(site, (args, kwargs), out) if isinstance(out, torch.Tensor) else out


@contextmanager
def shapes_noted() -> Iterator[dict[Site, tuple[list[torch.Size], torch.Size]]]:
    """Note the shapes of all operations in this context."""
    noted: dict[Site, tuple[list[torch.Size], torch.Size]] = {}

    def note(site: Site, args: Any, out: torch.Tensor) -> torch.Tensor:
        noted[site] = [t.shape for t in tensors_of(args)], out.shape
        return out

    with Operations(note):
        yield noted


def contractions(whole: Shapes, part: Shapes) -> list[Site]:
    """Return the operations that give a result of the same shape on a part of the rows as on all, from other
    arguments."""
    alike = {site: (whole[site], seen) for site, seen in part.items() if site in whole}
    return [
        site
        for site, ((given, made), (given_part, made_part)) in alike.items()
        if made == made_part and given != given_part and site[0] not in WITHOUT_VALUES
    ]


@contextmanager
def values_kept(sites: Sequence[Site]) -> Iterator[dict[Site, torch.Tensor]]:
    """Keep the results of these operations in this context."""
    kept: dict[Site, torch.Tensor] = {}

    def keep(site: Site, args: Any, out: torch.Tensor) -> torch.Tensor:
        if site in sites:
            kept[site] = out.clone()
        return out

    with Operations(keep):
        yield kept


@contextmanager
def values_given(values: Mapping[Site, torch.Tensor]) -> Iterator[dict[Site, torch.Tensor]]:
    """Go on with these values in place of the results of these operations; yields the results."""
    found: dict[Site, torch.Tensor] = {}

    def give(site: Site, args: Any, out: torch.Tensor) -> torch.Tensor:
        if site not in values:
            return out
        found[site] = out.clone()
        return values[site].clone()

    with Operations(give):
        yield found


def sums_of(
    values: Mapping[Site, torch.Tensor], found: Sequence[Mapping[Site, torch.Tensor]], rows: Sequence[int]
) -> Sums | None:
    """Return which operations are sums over the parts. values: their results on all rows. found: those on each part.
    rows: of each part. Returns None if some are neither sums nor means, nor the same on each part."""
    sums: dict[Site, RowSum] = {}
    for site, whole in values.items():
        parts = [own[site] for own in found if site in own]
        if len(parts) < len(found):
            return None
        if all(torch.equal(part, whole) for part in parts):
            continue
        weighted = [part * (n / sum(rows)) for part, n in zip(parts, rows, strict=True)]
        if not whole.is_floating_point() or not (close(whole, _added(parts)) or close(whole, _added(weighted))):
            return None
        sums[site] = RowSum(not close(whole, _added(parts)), tuple(whole.shape))
    return sums


def _added(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts)).sum(0, dtype=parts[0].dtype)


@contextmanager
def summed(sums: Sums, comm: Collectives, share: float) -> Iterator[None]:
    """Add up the results of these operations over the ranks. share: of the rows, that of this rank. Raises RankError,
    which ends all ranks, if the operations are not those of the trial: others wait for their sums."""
    left = set(sums)

    def add(site: Site, args: Any, out: torch.Tensor) -> torch.Tensor:
        expected = sums.get(site)
        if expected is None:
            return out
        if tuple(out.shape) != expected.shape:
            raise RankError(comm.group.rank, _changed(site, tuple(out.shape), expected.shape))
        left.discard(site)
        part = out * share if expected.mean else out
        part = part.clone(memory_format=torch.contiguous_format)
        return comm.all_reduce(part, meanwhile=lambda: None)  # other calls cannot run inside an operation

    with Operations(add):
        yield
    if left:
        raise RankError(comm.group.rank, _changed(min(left), None, sums[min(left)].shape))


def _changed(site: Site, shape: tuple[int, ...] | None, expected: tuple[int, ...]) -> str:
    made = "did not run" if shape is None else f"made {list(shape)}"
    text = f"call {site[1] + 1} of {site[0]} in a module {made}, but made {list(expected)} in an earlier call of its "
    return text + "kind, when it was found to be a sum over tokens; set ulysses_degree=1 and ring_degree=1"
