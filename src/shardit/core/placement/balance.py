"""Places everything that is not a block of a transformer, so that the fullest rank has little more than its share.

The blocks of transformers are placed before, by their cost. The rest runs once or twice for a request, so bytes decide:
encoders are cut into units, and units even out the remaining differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardit.core.modules.units import Unit

WHOLE_SHARE = 0.05
"""An encoder with a smaller share of one rank's bytes is not cut."""

WORTH_A_SPLIT = 0.01
"""If the bytes of two ranks differ by a smaller share, no layer is divided between them."""

SAME_SIZE = 0.05
"""Neighbouring units whose sizes differ by at most this share are distributed as runs."""


@dataclass(frozen=True)
class LayerOwners:
    """An encoder over the ranks of a replica: names of its units, and for each the member that owns it (the first of
    the tensor neighbours that do)."""

    units: tuple[str, ...]
    owners: tuple[int, ...]


@dataclass
class Loads:
    """Bytes on each member of a replica; `tp` neighbours share sliced components."""

    bytes: list[float]
    tp: int

    def put(self, nbytes: float, member: int, width: int) -> None:
        """Add bytes to `width` neighbours, which share them evenly."""
        for m in range(member, member + width):
            self.bytes[m] += nbytes / width

    def emptiest(self, width: int) -> int:
        """Return the first of the `width` neighbours with the fewest bytes."""
        return min(range(0, len(self.bytes), width), key=lambda m: (self.of(m, width), m))

    def fullest(self, width: int) -> int:
        """Return the first of the `width` neighbours with the most bytes."""
        return max(range(0, len(self.bytes), width), key=lambda m: (self.of(m, width), -m))

    def of(self, member: int, width: int) -> float:
        """Return the bytes of the fullest of some neighbours."""
        return max(self.bytes[member : member + width])


def distribute(
    loads: Loads, wholes: Mapping[str, float], encoders: Mapping[str, Sequence[Unit]], sliced: frozenset[str]
) -> tuple[dict[str, int], dict[str, LayerOwners]]:
    """Return owners of whole components and of the units of encoders: largest first, to the members with the fewest
    bytes so far.

    The same on every rank. Neighbouring units of a size form runs, so that few outputs have to be sent.
    """
    items = [(size, name, -1) for name, size in wholes.items()]
    items += [(unit.nbytes, name, i) for name, units in encoders.items() for i, unit in enumerate(units)]
    owners: dict[tuple[str, int], int] = {}
    for size, name, number in sorted(items, key=lambda item: (-item[0], item[1], item[2])):
        width = loads.tp if name in sliced else 1
        owners[name, number] = loads.emptiest(width)
        loads.put(size, owners[name, number], width)
    layerwise = {}
    for name, units in encoders.items():
        width = loads.tp if name in sliced else 1
        of_units = in_runs([unit.nbytes for unit in units], [owners[name, i] for i in range(len(units))])
        for i, unit in enumerate(units):
            loads.put(-unit.nbytes, owners[name, i], width)
            loads.put(unit.nbytes, of_units[i], width)
        named = _split_some(loads, units, of_units, width)
        layerwise[name] = LayerOwners(tuple(part for part, _ in named), tuple(owner for _, owner in named))
    return {name: owners[name, -1] for name in wholes}, layerwise


def _split_some(loads: Loads, units: Sequence[Unit], owners: Sequence[int], width: int) -> list[tuple[str, int]]:
    """Return the modules of all units with their owners, after parts of some were moved from the fullest to the
    emptiest."""
    moved: dict[str, int] = {}
    while True:
        empty, full = loads.emptiest(width), loads.fullest(width)
        gap = loads.of(full, width) - loads.of(empty, width)
        parts = [
            (abs(nbytes / width - gap / 2), -i, part, nbytes)
            for i, unit in enumerate(units)
            for part, nbytes in unit.parts
            if owners[i] == full and part not in moved and not any(other in moved for other, _ in unit.parts)
        ]
        if gap < WORTH_A_SPLIT * loads.of(full, width) or not parts:
            break
        off, _, part, nbytes = min(parts)
        if off >= gap / 2:  # the other one would become as full
            break
        moved[part] = empty
        loads.put(-nbytes, full, width)
        loads.put(nbytes, empty, width)
    named: list[tuple[str, int]] = []
    for unit, owner in zip(units, owners, strict=True):
        if any(part in moved for part, _ in unit.parts):
            named += [(part, moved.get(part, owner)) for part, _ in unit.parts]
        else:
            named += [(name, owner) for name in unit.names]
    return named


def even_shares(wholes: Sequence[float], sliced: float, ranks: int) -> tuple[float, ...]:
    """Return the share of the `sliced` bytes for each rank, so that ranks that own whole components get less."""
    loads = Loads([0.0] * ranks, 1)
    for size in sorted(wholes, reverse=True):
        loads.put(size, loads.emptiest(1), 1)
    level = (sum(wholes) + sliced) / ranks
    room = [max(level - load, 0.0) for load in loads.bytes]
    return tuple(one / sum(room) for one in room)


def in_runs(sizes: Sequence[float], owners: Sequence[int]) -> list[int]:
    """Return owners with the same number of units of each size, but neighbouring units together; tiny units join the
    one before."""
    out, start, total = list(owners), 0, sum(sizes)
    while start < len(sizes):
        end = start + 1
        while end < len(sizes) and abs(sizes[end] - sizes[start]) <= SAME_SIZE * sizes[start]:
            end += 1
        counts = Counter(out[start:end])
        first, last = out[start - 1] if start else None, out[end] if end < len(sizes) else None
        order = sorted(counts, key=lambda owner: (owner != first, owner == last, owner))
        out[start:end] = [owner for owner in order for _ in range(counts[owner])]
        if start and sizes[start] < total / 1000:
            out[start:end] = [out[start - 1]] * (end - start)
        start = end
    return out
