"""One virtual schedule: a total order of all steps of all calls in flight, the same list on every rank.

Pure Python over the `Flight` protocol, so that a model of in-order communicators can replay what it issues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Flight(Protocol):
    """One call in flight, cut into segments; segment k runs on stage owners[k]."""

    finished: bool

    @property
    def owners(self) -> Sequence[int]:
        """The stage of each segment."""
        ...

    def begin(self) -> None:
        """Run what comes before the first segment; on its owner also the first segment, and send."""
        ...

    def run(self, segment: int) -> None:
        """On the owner: take what hop segment - 1 brought, run the segment, send."""
        ...

    def post(self, segment: int) -> None:
        """On the owner of segment + 1: post the receive of the hop that follows `segment`."""
        ...

    def finish(self) -> None:
        """After the last segment: its owner sends the result back, all others post the receive of it."""
        ...


class Schedule:
    """Advances all calls in flight, each by one segment per tick, in the order in which they started.

    Every rank executes the same steps in the same order; a rank does its part of each (run, post, or nothing). Each
    message is posted by its receiver at the step at which its sender sends it, so all communication is a projection of
    one total order and cannot wait in a circle, whatever communicators it is spread over.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.active: list[Flight] = []
        self.most_in_flight = 0
        self._next: dict[int, int] = {}  # id of the flight -> segment of its next step

    def start(self, flight: Flight) -> None:
        """Begin a call and take its first step at once, so that the caller may go on to its next call."""
        self.active.append(flight)
        self.most_in_flight = max(self.most_in_flight, len(self.active))
        self._next[id(flight)] = 0
        try:
            flight.begin()
            self._step(flight)
        except BaseException:
            self._drop(flight)
            raise

    def tick(self) -> None:
        """One step of every call in flight."""
        for flight in list(self.active):
            self._step(flight)

    def drain(self, flight: Flight | None = None) -> None:
        """Tick until `flight` (or everything) is virtually done."""
        while self.active if flight is None else not flight.finished:
            self.tick()

    def _step(self, flight: Flight) -> None:
        segment = self._next[id(flight)]
        owners = flight.owners
        if segment > 0 and owners[segment] == self.rank:
            flight.run(segment)
        if segment + 1 < len(owners):
            if owners[segment + 1] == self.rank:
                flight.post(segment)
            self._next[id(flight)] = segment + 1
        else:
            flight.finish()
            flight.finished = True
            self._drop(flight)

    def _drop(self, flight: Flight) -> None:
        self._next.pop(id(flight), None)
        self.active = [f for f in self.active if f is not flight]
