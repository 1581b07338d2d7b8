"""Ranks that do not go on: silent for too long, or waiting for one that has failed a request alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from shardit.engine.process.failure import Failure
from shardit.engine.process.in_flight import InFlight
from shardit.engine.process.rank_group import RankGroup
from shardit.engine.process.stacks import waits_for_peer


class HangDetector:
    """Watches the requests in flight, and reports ranks that do not go on to the rank group.

    bound(replica): the longest silence, in seconds, that is not a hang. doubt_s: seconds between two looks at ranks of
    which some have failed a request.
    """

    def __init__(
        self,
        rank_group: RankGroup,
        in_flight: Callable[[], Iterable[InFlight]],
        bound: Callable[[int], float],
        doubt_s: float,
    ):
        self._rank_group, self._in_flight, self._bound, self._doubt_s = rank_group, in_flight, bound, doubt_s
        self._last_sign: dict[int, float] = {}
        self._looking = False
        self._look_at = 0.0
        self._stacks: dict[int, str] = {}
        rank_group.explain = self.explain

    def explain(self) -> Failure | None:
        """The failure of a rank on which alone a request has failed, if there is one: its peers may give up on it."""
        found = [one.alone for one in self._failed_alone()]
        return Failure(f"it alone ended a request: {found[0][1]}", rank=found[0][0]) if found and found[0] else None

    def reset(self) -> None:
        """The ranks have just started."""
        self._looking, self._stacks = False, {}

    def begins(self, replica: int) -> None:
        """An idle replica gets a request."""
        self._last_sign[replica] = time.monotonic()

    def heard(self, replica: int) -> float:
        """A message of a replica has arrived; returns the seconds of silence before it."""
        now = time.monotonic()
        silence = now - self._last_sign.get(replica, now)
        self._last_sign[replica] = now
        return silence

    def look(self) -> None:
        """Notice ranks that do not go on. To be called a few times per second."""
        if self._rank_group.failing:
            return
        if (found := self.overdue()) is not None:
            self._rank_group.hang(*found)
        elif not self._failed_alone():
            self._stacks = {}
        elif not self._looking and time.monotonic() >= self._look_at:
            self._looking = True
            self._rank_group.look(self._seen)

    def overdue(self) -> tuple[str, list[int]] | None:
        """Why ranks are taken to hang, and the ranks without an answer, if a replica has been silent for too long."""
        now = time.monotonic()
        for replica in {one.replica for one in self._in_flight()}:
            silence = now - self._last_sign.get(replica, now)
            if silence > self._bound(replica):
                here = [one for one in self._in_flight() if one.replica == replica]
                silent = [rank for rank in here[0].ranks if any(rank not in one.finished for one in here)]
                alone = "".join(f"; {_alone(one)}" for one in self._failed_alone()[:1])
                return f"no progress for {silence:.0f} s{alone}", silent
        return None

    def _failed_alone(self) -> list[InFlight]:
        return [one for one in self._in_flight() if one.alone is not None]

    def _seen(self, stacks: dict[int, str]) -> None:
        self._looking, self._look_at = False, time.monotonic() + self._doubt_s
        before, self._stacks = self._stacks, stacks
        for one in self._failed_alone():
            assert one.alone is not None
            if all(waits_for_peer(stacks.get(rank, "")) and stacks[rank] == before.get(rank) for rank in one.ranks):
                rank, reason = one.alone
                self._rank_group.fail(f"it alone ended a request: {reason}", rank)
                return


def _alone(one: InFlight) -> str:
    assert one.alone is not None
    rank, reason = one.alone
    return f"rank {rank} alone ended a request: {reason}"
