"""Records the operations of every rank of a pipeline, without tensors, processes or messages.

The real `Schedule` and `RequestLoop` run once per rank over flights that only record the operations of a `StagedCall`.
`replay` runs the records against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shardit.core.runtime.program import Flight, Program
from shardit.core.runtime.request_loop import RequestLoop, Schedule


@dataclass(frozen=True)
class Workload:
    """The replayed work: requests of `steps` steps, each of `branches` calls that are started together (guidance, or a
    split batch), on `ranks` stages with `chunks` chunks each. max_outstanding: see `Comm`."""

    ranks: int
    chunks: int = 1
    branches: int = 1
    requests: int = 1
    steps: int = 1
    max_in_flight: int = 1
    max_outstanding: int = 64

    @property
    def calls(self) -> int:
        """Number of transformer calls."""
        return self.requests * self.steps * self.branches


@dataclass(frozen=True)
class Op:
    """One operation of a rank. kind: "send" or "recv" (only begins it), "wait" (until the message is through), or
    "compute" (one chunk). call: number of the call, in the order of starts; segment: of the call, the hop after it for
    messages. result: the message is the way back to `target`."""

    kind: str
    call: int
    segment: int
    source: int = -1
    target: int = -1
    result: bool = False

    @property
    def message(self) -> tuple[int, int, int, bool]:
        """Key of one message, common to its send, its receive and its waits."""
        return (self.call, self.segment, self.target, self.result)


@dataclass
class RankLog:
    """The record of one rank: ops in order, and the (call, segment) steps of its schedule."""

    ops: list[Op] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)


class RecordedFlight:
    """A call that only records the operations of a `StagedCall` on this rank."""

    def __init__(self, number: int, recorder: _Recorder):
        load = recorder.load
        self.number = number
        self.owners: Sequence[int] = [chunk % load.ranks for chunk in range(load.ranks * load.chunks)]
        self.finished = False
        self._recorder = recorder

    def begin(self) -> None:
        """On the owner of the first segment: run it and send."""
        if self.owners[0] == self._recorder.rank:
            self._segment(0)

    def run(self, segment: int) -> None:
        """Wait for the hop before, run, send."""
        if self.owners[segment - 1] != self._recorder.rank:
            self._recorder.take(self._hop("wait", segment - 1))
        self._segment(segment)

    def post(self, segment: int) -> None:
        """Post the receive of the hop after `segment`."""
        if self.owners[segment] != self._recorder.rank:
            self._recorder.log.ops.append(self._hop("recv", segment))

    def finish(self) -> None:
        """Send the result to all others, or post the receive of it."""
        last = self.owners[-1]
        targets = [s for s in range(self._recorder.load.ranks) if s != last]
        for target in targets if self._recorder.rank == last else [self._recorder.rank]:
            if target != last:
                kind = "send" if self._recorder.rank == last else "recv"
                self._recorder.hold(Op(kind, self.number, len(self.owners) - 1, last, target, True))

    def take(self) -> None:
        """Record the waits of the first use of the result once the call is virtually done."""
        me, last = self._recorder.rank, self.owners[-1]
        if me != last:
            self._recorder.take(Op("wait", self.number, len(self.owners) - 1, last, me, True))

    def _segment(self, segment: int) -> None:
        self._recorder.log.ops.append(Op("compute", self.number, segment))
        if segment + 1 < len(self.owners) and self.owners[segment + 1] != self._recorder.rank:
            self._recorder.hold(self._hop("send", segment))

    def _hop(self, kind: str, segment: int) -> Op:
        return Op(kind, self.number, segment, self.owners[segment], self.owners[segment + 1])


class _LoggedSchedule(Schedule):
    def __init__(self, rank: int, log: RankLog):
        super().__init__(rank)
        self._log = log

    def _step(self, flight: Flight) -> None:
        assert isinstance(flight, RecordedFlight)
        self._log.steps.append((flight.number, self._next[id(flight)]))
        super()._step(flight)


class _Recorder:
    """One rank: its log, and the messages held and awaited, as in `Comm`."""

    def __init__(self, load: Workload, rank: int):
        self.load, self.rank, self.log = load, rank, RankLog()
        self._held: dict[tuple[int, int, int, bool], Op] = {}
        self._calls = 0

    def run(self) -> RankLog:
        loop = RequestLoop(_LoggedSchedule(self.rank, self.log))
        programs = [Program(lambda: self._request(loop), seed=0) for _ in range(self.load.requests)]
        for program in loop.run(iter(programs), self.load.max_in_flight):
            if program.error is not None:
                raise program.error
        return self.log

    def _request(self, loop: RequestLoop) -> None:
        for _ in range(self.load.steps):
            flights = []
            for _ in range(self.load.branches):
                flights.append(RecordedFlight(self._calls, self))
                self._calls += 1
                loop.schedule.start(flights[-1])
            for flight in flights:
                loop.wait_for(flight)
                flight.take()

    def wait(self, op: Op) -> None:
        self._held.pop(op.message, None)
        self.log.ops.append(op)

    def hold(self, op: Op) -> None:
        self.log.ops.append(op)
        self._held[op.message] = op
        while len(self._held) > self.load.max_outstanding:
            self.wait(replace(next(iter(self._held.values())), kind="wait"))

    def take(self, op: Op) -> None:
        """Wait for a message, and for earlier sends of this rank in the same call."""
        self.wait(op)
        for held in [h for h in self._held.values() if h.call == op.call and h.kind == "send" and not h.result]:
            self.wait(replace(held, kind="wait"))


def record(load: Workload) -> list[RankLog]:
    """Record the operations of every rank, from the real schedule and request loop."""
    return [_Recorder(load, rank).run() for rank in range(load.ranks)]
