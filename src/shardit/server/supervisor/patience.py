"""How long ranks may be silent before they are taken to hang, learned from how long they were."""

from __future__ import annotations

import os

from shardit.server.supervisor.running import Size

MIN_PATIENCE_S = 10.0
TIMES_SLOWEST = 5.0
"""Ranks are taken to hang when they are silent for the larger of 10 s and five times the longest silence so far, both
times `slowdown`: ranks of a loaded machine are slow, not stuck."""
MAX_SIZES = 512
"""Sizes that are remembered; of more, those that ran last."""


def slowdown() -> float:
    """How many times longer this machine takes while more threads want to run than it has cores; 1 where they do not.

    Ranks on other machines are not counted.
    """
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Patience:
    """The longest silences by size of the jobs."""

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
