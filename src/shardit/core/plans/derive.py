"""Derives the plan of a call from its trace: the data that stages send to each other.

Liveness analysis over the contents of storages. A *version* is the content of a storage after one write to it. A
version is carried if it derives from a block, was written before a cut and is read after it. Some storages are neither
an argument nor an output of any block, so that ranks have no name for them: the stage that needs one computes it again
from carried data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit.core.comm.wire import ALIGN, pack_layout
from shardit.core.plans.call_plan import Address, CallPlan, Hop, HopItem, Leaf, ResultPlan, segments_of
from shardit.core.plans.trace import Event, Trace
from shardit.errors import UnsupportedError

Version = tuple[int, int]
"""A storage, and the number of the event that wrote its content."""


@dataclass(frozen=True)
class _Carried:
    """A version in a hop: the sender has it at the exit of call site `taken`, the receiver gets it at `placed`."""

    version: Version
    taken: int
    placed: int


@dataclass
class _Derivation:
    """A traced call and its segments: events in order (the last one reads the result), and the writers of each storage.

    owner[k]: stage of segment k. segment_of[n]: segment of call site n. writes[storage]: events that write data derived
    from blocks to it, in order. again[event]: stages that repeat an event outside blocks although it belongs to another
    stage.
    """

    trace: Trace
    events: list[Event]
    segments: list[tuple[int, int]]
    owner: list[int]
    segment_of: list[int]
    writes: dict[int, list[int]] = field(default_factory=dict)
    again: dict[int, set[int]] = field(default_factory=dict)

    @staticmethod
    def of(trace: Trace, result: list[Any]) -> _Derivation:
        end = tuple(trace.number(t) for t in result if isinstance(t, torch.Tensor))
        events = [*trace.events, Event(len(trace.sites), end, (), False)]
        owners = [site.owner for site in trace.sites]
        segments = segments_of(owners)
        segment_of = [k for k, (first, last) in enumerate(segments) for _ in range(first, last + 1)]
        call = _Derivation(trace, events, segments, [owners[first] for first, _ in segments], segment_of)
        for number, event in enumerate(events):
            for storage in event.writes if event.derived else ():
                call.writes.setdefault(storage, []).append(number)
        return call

    def runs(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield (stage, segment) for each stage that runs an event on real data. The segment is -1 for the prologue,
        which every rank runs. Code after block call n - 1 belongs to the owner of block call n, which has received its
        inputs."""
        event = self.events[number]
        if event.after == 0 and not event.block:
            yield -1, -1
            return
        segment = self.segment_of[event.after] if event.after < len(self.segment_of) else len(self.segments) - 1
        yield self.owner[segment], segment
        for stage in sorted(self.again.get(number, ())):
            yield stage, self.next_segment(stage, segment)

    def next_segment(self, stage: int, segment: int) -> int:
        """Return the first segment of a stage that is not before the given one."""
        return next(k for k in range(segment, len(self.owner)) if self.owner[k] == stage)

    def passed(self, segment: int) -> int:
        """Return the last call site of the previous segment of the stage that owns `segment`; 0 if there is none."""
        before = [k for k in range(segment) if self.owner[k] == self.owner[segment]]
        return self.segments[before[-1]][1] if before else 0

    def lasts(self, version: Version) -> int:
        """Return the last call site at whose exit the storage still has the version."""
        writes = self.writes[version[0]]
        following = writes.index(version[1]) + 1
        return self.events[writes[following]].after - 1 if following < len(writes) else len(self.segment_of)


def derive(trace: Trace, result: list[Any], result_spec: Any, result_leaves: tuple[Leaf, ...]) -> CallPlan:
    """Derive the plan of a traced call. Raises UnsupportedError if needed data can be neither carried nor computed
    again."""
    call = _Derivation.of(trace, result)
    carried = None
    while carried is None:  # each round that finds something missing adds to `again`, so it ends
        carried = _carry(call)
    hops = _hops(call, carried)
    out = ResultPlan.of(result_spec, result_leaves)
    return CallPlan(tuple(trace.sites), tuple(call.segments), tuple(call.owner), hops, out)


def _carry(call: _Derivation) -> list[list[_Carried]] | None:
    """Return the versions in every hop, or None if a stage has to repeat more events, which are then in
    `call.again`."""
    carried: list[list[_Carried]] = [[] for _ in call.owner[1:]]
    holders: dict[Version, dict[int, int]] = {}  # -> {stage: first segment for which it has this version}
    current: dict[int, int] = {}
    missing = False
    for number, event in enumerate(call.events):
        for stage, segment in list(call.runs(number)):
            for version in [(s, current[s]) for s in event.reads if s in current]:
                if not _bring(call, version, segment, event.after - 1, holders[version], carried):
                    _run_again(call, version, stage)
                    missing = True
        for storage in event.writes if event.derived else ():
            current[storage] = number
            holders[storage, number] = {}
            for stage, segment in call.runs(number):
                holders[storage, number].setdefault(stage, segment)
    return None if missing else carried


def _bring(
    call: _Derivation, version: Version, segment: int, before: int, held: dict[int, int], carried: list[list[_Carried]]
) -> bool:
    """Carry a version to the owner of `segment` by the exit of call site `before`, hop by hop, from the nearest stage
    that has it. Returns False, without a change, if that is impossible."""
    path: list[tuple[int, _Carried]] = []
    k = segment
    while held.get(call.owner[k], k + 1) > k:
        taken = min(call.segments[k - 1][1], call.lasts(version))
        placed = min(taken, before)
        if max(call.events[version[1]].after, call.passed(k)) > placed or not _handles(call, version[0], placed):
            return False
        path.append((k, _Carried(version, taken, placed)))
        before = taken
        k -= 1
    for k, item in path:
        held[call.owner[k]] = k
        carried[k - 1].append(item)
    return True


def _run_again(call: _Derivation, version: Version, stage: int) -> None:
    """Mark a version for computation by a stage itself."""
    storage, writer = version
    if call.events[writer].block:
        raise UnsupportedError(
            f"a tensor that derives from a block's output ({call.trace.makers.get(storage, 'an output')}) is needed "
            "in a later stage, which has no name for it when it needs it and cannot compute it by itself; where "
            "another list of blocks makes it, name only the main lists in Plan(order=...): lists left out are not cut"
        )
    call.again.setdefault(writer, set()).add(stage)


def _hops(call: _Derivation, carried: list[list[_Carried]]) -> tuple[Hop, ...]:
    trace, received = call.trace, set[tuple[int, int]]()  # (storage, stage) whose placeholder was filled before
    hops = []
    for k, found in enumerate(carried):
        last, target = call.segments[k][1], call.owner[k + 1]
        pause = min((item.placed for item in found), default=last)
        items = []
        for item in sorted(found, key=lambda item: item.version):
            storage = item.version[0]
            address = _address(trace, storage, _handles(call, storage, item.placed))
            writes = [call.events[number].after for number in call.writes[storage]]
            start, stop = trace.extent[storage]
            start -= start % ALIGN  # some CPU kernels round differently for differently aligned memory
            fresh = (
                address.kind == "out"
                and trace.created.get(storage) == address.site
                and trace.sites[address.site].owner != target
                and (storage, target) not in received
                # Data that arrives before a write of repeated code would be overwritten.
                and not any(max(pause, address.site) < after <= item.placed for after in writes)
            )
            received.add((storage, target))
            # The sender's memory can be sent without a copy only if nothing writes to it afterwards.
            copy = any(after > last for after in writes)
            place = start - trace.places[address]
            items.append(HopItem(address, place, stop - start, fresh, copy, item.taken, item.placed))
        hops.append(Hop(call.owner[k], target, tuple(items), pack_layout(tuple(i.size for i in items)), pause))
    return tuple(hops)


def _handles(call: _Derivation, storage: int, site: int) -> list[Address]:
    """Return the handles of a storage that exist at the exit of a call site."""
    return [a for a in call.trace.handles.get(storage, ()) if a.site <= site]


def _address(trace: Trace, storage: int, handles: list[Address]) -> Address:
    """Return the place where a storage was made if possible, else the first handle."""
    created = trace.created.get(storage)
    return next((a for a in handles if a.kind == "out" and a.site == created), handles[0])
