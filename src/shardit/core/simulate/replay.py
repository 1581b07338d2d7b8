"""Replays a schedule: whether it can hang under in-order communicators, its time, and its traffic.

A model of the wire, pure Python: each communicator of a rank runs that rank's operations in the order in which they
were issued, one at a time, and a send and its receive start and end together. NCCL behaves so; gloo, under which most
tests run, hides mistakes of order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from shardit.core.simulate.record import Op, Workload, record

Grouping = Callable[[Op, int], Hashable]
"""The communicator of a message between stages of a pipeline of the given size."""


def per_edge(op: Op, ranks: int) -> Hashable:
    """Return the communicator as `mesh` makes it: one per directed edge of the ring, and one for results and all other
    hops."""
    on_ring = (op.source + 1) % ranks == op.target and not op.result
    return (op.source, op.target) if on_ring else "back"


def per_pair(op: Op, ranks: int) -> Hashable:
    """Return one communicator for both directions between two stages, results included."""
    return frozenset((op.source, op.target))


def one_for_all(op: Op, ranks: int) -> Hashable:
    """Return a single communicator for all messages."""
    return "all"


GROUPINGS: tuple[Grouping, ...] = (per_edge, per_pair, one_for_all)


@dataclass(frozen=True)
class Execution:
    """The result of a replay.

    stuck: the awaited message of each rank that did not finish. unmatched: messages begun on one side that never got
    through. finish: end time of each rank; busy: its computing time. hops, results: messages of each kind.
    """

    stuck: dict[int, Op]
    unmatched: int
    finish: list[float]
    busy: list[float]
    hops: int
    results: int

    @property
    def hangs(self) -> bool:
        """Whether some rank or some message did not finish."""
        return bool(self.stuck) or self.unmatched > 0

    @property
    def makespan(self) -> float:
        """End time of the last rank."""
        return max(self.finish)

    @property
    def idle(self) -> list[float]:
        """Share of the makespan in which each rank does not compute."""
        return [1 - busy / self.makespan if self.makespan else 0.0 for busy in self.busy]


class _Wire:
    """The running ranks. A rank continues until a wait for a message that is not through yet."""

    def __init__(self, ops: Sequence[Sequence[Op]], grouping: Grouping, chunk_cost: float, hop_cost: float):
        self.ops, self.grouping = ops, grouping
        self.chunk_cost, self.hop_cost = chunk_cost, hop_cost
        self.at = [0] * len(ops)
        self.clock, self.busy = [0.0] * len(ops), [0.0] * len(ops)
        self.through: dict[Hashable, float] = {}  # message -> time at which it was through
        self.queues: dict[tuple[int, Hashable], deque[tuple[Op, float]]] = defaultdict(deque)
        self.free: dict[tuple[int, Hashable], float] = defaultdict(float)
        self.ready = deque(range(len(ops)))

    def run(self) -> None:
        while self.ready:
            rank = self.ready.popleft()
            while self.at[rank] < len(self.ops[rank]) and self._do(rank, self.ops[rank][self.at[rank]]):
                self.at[rank] += 1

    def _do(self, rank: int, op: Op) -> bool:
        if op.kind == "compute":
            self.clock[rank] += self.chunk_cost
            self.busy[rank] += self.chunk_cost
        elif op.kind == "wait":
            if op.message not in self.through:
                return False
            self.clock[rank] = max(self.clock[rank], self.through[op.message])
        else:
            group = self.grouping(op, len(self.ops))
            self.queues[rank, group].append((op, self.clock[rank]))
            self._match(rank, group)
        return True

    def _match(self, rank: int, group: Hashable) -> None:
        """Let through the first message in the communicator on both of its ends, and those that this makes first."""
        look = [rank]
        while look:
            here = look.pop()
            if not self.queues[here, group]:
                continue
            op, issued = self.queues[here, group][0]
            there = op.source if op.target == here else op.target
            other = self.queues[there, group]
            if not other or other[0][0].message != op.message:
                continue
            start = max(issued, other[0][1], self.free[here, group], self.free[there, group])
            self.free[here, group] = self.free[there, group] = self.through[op.message] = start + self.hop_cost
            for end in (here, there):
                self.queues[end, group].popleft()
                look.append(end)
                self.ready.append(end)


def execute(
    ops: Sequence[Sequence[Op]], grouping: Grouping = per_edge, chunk_cost: float = 1.0, hop_cost: float = 0.0
) -> Execution:
    """Run the operations of all ranks against each other; costs are in any unit of time."""
    wire = _Wire(ops, grouping, chunk_cost, hop_cost)
    wire.run()
    stuck = {rank: ops[rank][at] for rank, at in enumerate(wire.at) if at < len(ops[rank])}
    unmatched = len({op.message for queue in wire.queues.values() for op, _ in queue})
    sent = [op for of_rank in ops for op in of_rank if op.kind == "send" and op.message in wire.through]
    results = sum(op.result for op in sent)
    return Execution(stuck, unmatched, wire.clock, wire.busy, len(sent) - results, results)


def deadlock_free(ops: Sequence[Sequence[Op]], grouping: Grouping = per_edge) -> bool:
    """Return whether all ranks finish and every message gets through."""
    return not execute(ops, grouping).hangs


@dataclass(frozen=True)
class Timeline:
    """A replayed workload. speedup: over one rank that computes everything. idle: share per rank. The rest is per step
    of one request, over all ranks."""

    makespan: float
    speedup: float
    idle: tuple[float, ...]
    hops_per_step: float
    results_per_step: float
    bytes_per_step: float


def timeline(
    load: Workload,
    *,
    chunk_cost: float = 1.0,
    hop_cost: float = 0.0,
    hop_bytes: int = 0,
    result_bytes: int = 0,
    grouping: Grouping = per_edge,
) -> Timeline:
    """Return the time of a workload if every chunk and every message costs the same, and its traffic."""
    run = execute([log.ops for log in record(load)], grouping, chunk_cost, hop_cost)
    assert not run.hangs, run.stuck
    steps = load.requests * load.steps
    work = load.calls * load.ranks * load.chunks * chunk_cost
    sent = run.hops * hop_bytes + run.results * result_bytes
    return Timeline(
        run.makespan, work / run.makespan, tuple(run.idle), run.hops / steps, run.results / steps, sent / steps
    )


__all__ = ["GROUPINGS", "Execution", "Op", "Timeline", "Workload", "deadlock_free", "execute", "record", "timeline"]
