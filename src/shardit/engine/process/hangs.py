"""Detects ranks that hang: silent for too long, or waiting for one that has failed a request alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from shardit.engine.process.failure import Failure
from shardit.engine.process.in_flight import InFlight
from shardit.engine.process.rank_group import RankGroup
from shardit.engine.process.stacks import waits_for_peer


def slowdown() -> float:
    """Return how many times more threads want to run than this machine has cores; at least 1.

    Ranks on other machines are not counted.
    """
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class HangDetector:
    """Monitors the requests in flight, and reports hanging ranks to the rank group.

    bound(replica): the longest silence, in seconds, that is not a hang. probe_s: seconds between two inspections of
    ranks when some have failed a request.
    """

    def __init__(
        self,
        rank_group: RankGroup,
        in_flight: Callable[[], Iterable[InFlight]],
        bound: Callable[[int], float],
        probe_s: float,
    ):
        self._rank_group, self._in_flight, self._bound, self._probe_s = rank_group, in_flight, bound, probe_s
        self._last_sign: dict[int, float] = {}
        self._reading = False
        self._read_at = 0.0
        self._stacks: dict[int, str] = {}
        rank_group.explain = self.explain

    def explain(self) -> Failure | None:
        """Return the failure of a rank that alone has failed a request, if there is one: its peers may give up on
        it."""
        return next((failure for one in self._in_flight() if (failure := _alone(one)) is not None), None)

    def reset(self) -> None:
        """Reset after a start of the ranks."""
        self._reading, self._stacks = False, {}

    def begins(self, replica: int) -> None:
        """Record that an idle replica gets a request."""
        self._last_sign[replica] = time.monotonic()

    def record_message(self, replica: int) -> float:
        """Record a message of a replica; returns the seconds of silence before it."""
        now = time.monotonic()
        silence = now - self._last_sign.get(replica, now)
        self._last_sign[replica] = now
        return silence

    def check(self) -> None:
        """Detect and report hanging ranks. To be called a few times per second."""
        if self._rank_group.failing:
            return
        if (found := self.overdue()) is not None:
            self._rank_group.hang(*found)
        elif self.explain() is None:
            self._stacks = {}
        elif not self._reading and time.monotonic() >= self._read_at:
            self._reading = True
            self._rank_group.read_stacks(self._seen)

    def overdue(self) -> tuple[str, list[int]] | None:
        """Return a reason and the ranks without an answer, if a replica has been silent for too long."""
        now = time.monotonic()
        for replica in {one.replica for one in self._in_flight()}:
            silence = now - self._last_sign.get(replica, now)
            if silence > self._bound(replica):
                here = [one for one in self._in_flight() if one.replica == replica]
                silent = [rank for rank in here[0].ranks if any(rank not in one.finished for one in here)]
                alone = self.explain()
                return f"no progress for {silence:.0f} s" + (f"; {alone.text}" if alone else ""), silent
        return None

    def _seen(self, stacks: dict[int, str]) -> None:
        self._reading, self._read_at = False, time.monotonic() + self._probe_s
        before, self._stacks = self._stacks, stacks
        for one in self._in_flight():
            alone = _alone(one)
            stuck = all(waits_for_peer(stacks.get(rank, "")) and stacks[rank] == before.get(rank) for rank in one.ranks)
            if alone is not None and stuck:
                self._rank_group.fail(alone.reason, alone.rank)
                return


def _alone(one: InFlight) -> Failure | None:
    """Return the failure of a rank that alone has failed a request."""
    return None if one.alone is None else Failure(f"it alone ended a request: {one.alone[1]}", rank=one.alone[0])
