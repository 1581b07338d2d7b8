"""Ranks that do not go on: silent for too long, or waiting for one that has failed alone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from shardit.engine.process.monitor import waits_for_peer
from shardit.server.supervisor.rank_group import RankGroup
from shardit.server.supervisor.running import Running, Size, in_flight

MIN_PATIENCE_S = 10.0
TIMES_SLOWEST = 5.0
"""Ranks are taken to hang when they are silent for the larger of 10 s and five times the longest silence so far, both
times `slowdown`: ranks of a loaded machine are slow, not stuck."""
MAX_SIZES = 512
"""Sizes that are remembered; of more, those that ran last."""
DOUBT_S = 0.5
"""Between two looks at ranks of which some have ended a request by an error."""


def slowdown() -> float:
    """How many times longer this machine takes while more threads want to run than it has cores; 1 where they do not.

    Ranks on other machines are not counted.
    """
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Patience:
    """How long ranks may be silent, learned from how long they were."""

    def __init__(self, first_s: float):
        self._first_s = first_s
        self._slowest: dict[Size, float] = {}  # by when they ran last
        self._known: set[Size] = set()
        self.cold = True
        """Whether nothing has completed since the ranks started: their first steps load kernels and connect."""

    def saw(self, size: Size, silence_s: float) -> None:
        """Jobs of this size have been silent for so long, and then were not."""
        self._slowest[size] = max(self._slowest.pop(size, 0.0), silence_s)
        if len(self._slowest) > MAX_SIZES:
            oldest = next(iter(self._slowest))
            del self._slowest[oldest]
            self._known.discard(oldest)

    def completed(self, size: Size) -> None:
        """A job of this size has run from beginning to end."""
        self.saw(size, 0.0)
        self._known.add(size)
        self.cold = False

    def bound(self, sizes: list[Size]) -> float:
        """The longest silence, in seconds, that is not a hang while jobs of these sizes run together."""
        if any(size not in self._known for size in sizes):
            return self._first_s
        start = max(self._slowest.values()) if self.cold else 0.0  # the slowest so far holds an earlier start
        return max(MIN_PATIENCE_S, TIMES_SLOWEST * (start + sum(self._slowest[size] for size in sizes)))


class HangDetector:
    """Looks after the jobs in flight (`running`, which the dispatcher keeps) and has the ranks started anew where they
    do not go on. `together` ranks are one replica."""

    def __init__(self, rank_group: RankGroup, running: Mapping[int, Running], together: int, first_s: float):
        self.patience = Patience(first_s)
        self._rank_group, self._running, self._together = rank_group, running, together
        self._last_sign: dict[int, float] = {}
        self._looking = False
        self._look_at = 0.0
        self._stacks: dict[int, str] = {}

    def ready(self) -> None:
        """The ranks have just started."""
        self.patience.cold = True
        self._looking, self._stacks = False, {}

    def begins(self, replica: int) -> None:
        """A replica that was idle has a job."""
        self._last_sign[replica] = time.monotonic()

    def heard(self, replica: int) -> None:
        """A replica has said something."""
        now = time.monotonic()
        silence = now - self._last_sign.get(replica, now)
        self._last_sign[replica] = now
        for running in in_flight(self._running, replica):
            self.patience.saw(running.size, silence)

    def look(self) -> None:
        """Notice ranks that do not go on. To be called a few times per second."""
        if self._rank_group.failing:
            return
        if (reason := self.overdue()) is not None:
            self._rank_group.hang(reason)
        elif not self._failed_alone():
            self._stacks = {}
        elif not self._looking and time.monotonic() >= self._look_at:
            self._looking = True
            self._rank_group.look(self._seen)

    def overdue(self) -> str | None:
        """Why ranks are taken to hang, if they have been silent for too long."""
        now = time.monotonic()
        for replica in {running.replica for running in self._running.values()}:
            silence = now - self._last_sign.get(replica, now)
            bound = self.patience.bound([running.size for running in in_flight(self._running, replica)])
            if silence > bound and silence > bound * slowdown():
                told = "".join(f"; {self._alone(running)}" for running in self._failed_alone()[:1])
                return f"no sign of life for {silence:.0f} s{told}"
        return None

    def _failed_alone(self) -> list[Running]:
        """Jobs that have failed on some of their ranks. Their peers may come to it, or wait for ever."""
        return [running for running in self._running.values() if 0 < len(running.errors) < self._together]

    def _alone(self, running: Running) -> str:
        rank, why = next(iter(running.errors.items()))
        return f"rank {rank} alone failed: {why}"

    def _seen(self, stacks: dict[int, str]) -> None:
        self._looking, self._look_at = False, time.monotonic() + DOUBT_S
        before, self._stacks = self._stacks, stacks
        for running in self._failed_alone():
            ranks = range(running.replica * self._together, (running.replica + 1) * self._together)
            if all(waits_for_peer(stacks.get(rank, "")) and stacks[rank] == before.get(rank) for rank in ranks):
                self._rank_group.fail(self._alone(running))
                return
