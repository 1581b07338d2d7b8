"""Learns the time limit for silent ranks from earlier silences."""

from __future__ import annotations

from shardit.server.supervisor.running import Size

MIN_LIMIT_S = 10.0
TIMES_SLOWEST = 5.0
"""Ranks count as hanging when they are silent for the larger of 10 s and five times the longest silence so far, both
times `hangs.slowdown`: ranks of a loaded machine are slow, not stuck."""
MAX_SIZES = 512
"""Number of remembered sizes; the least recently used ones are dropped."""


class SilenceLimit:
    """The longest silences by size of the jobs."""

    def __init__(self, first_s: float):
        self._first_s = first_s
        self._slowest: dict[Size, float] = {}  # least recently run first
        self._known: set[Size] = set()
        self.cold = True
        """Whether nothing has completed since the ranks started: their first steps load kernels and connect."""

    def record(self, size: Size, silence_s: float) -> None:
        """Record a silence during jobs of this size that ended on its own."""
        self._slowest[size] = max(self._slowest.pop(size, 0.0), silence_s)
        if len(self._slowest) > MAX_SIZES:
            oldest = next(iter(self._slowest))
            del self._slowest[oldest]
            self._known.discard(oldest)

    def completed(self, size: Size) -> None:
        """Record that a job of this size has run from beginning to end."""
        self.record(size, 0.0)
        self._known.add(size)
        self.cold = False

    def bound(self, sizes: list[Size]) -> float:
        """Return the longest silence, in seconds, that is not a hang while jobs of these sizes run together."""
        if any(size not in self._known for size in sizes):
            return self._first_s
        start = max(self._slowest.values()) if self.cold else 0.0  # the slowest so far includes an earlier start
        return max(MIN_LIMIT_S, TIMES_SLOWEST * (start + sum(self._slowest[size] for size in sizes)))
