"""Heartbeat of the API process: a hung or stopped process does not exit, so only a missed beat reveals it."""

from __future__ import annotations

import time
from collections.abc import Callable

from shardit.engine.process.hangs import slowdown

PROBE_INTERVAL_S = 1.0
HANG_TIMEOUT_S = 10.0
"""Longest silence of an event loop, in seconds, that is not a hang; longer on a loaded machine (`slowdown`)."""
START_TIMEOUT_S = 60.0
"""The same before the first answer: the process starts and imports."""
MAX_COUNTED_S = 5.0
"""Upper limit of the silence counted between two checks, in seconds. If the supervisor itself has stood still (a
suspended machine, a stuck disk), the process gets a chance to answer first."""
MAX_SLOWDOWN = 6.0
"""Upper limit of the factor for a loaded machine."""


class Heartbeat:
    """Calls `probe()` regularly; call `answered` from any thread when an answer arrives."""

    def __init__(self, probe: Callable[[], None]):
        self._probe = probe
        self._waiting = False
        self._probed_at = -PROBE_INTERVAL_S
        self._checked_at = time.monotonic()
        self._silence_s, self._limit_s = 0.0, START_TIMEOUT_S

    def answered(self) -> None:
        """Record an answer."""
        self._waiting, self._limit_s = False, HANG_TIMEOUT_S

    def hangs(self) -> bool:
        """Return whether it has been silent for too long. To be called a few times per second."""
        now = time.monotonic()
        passed, self._checked_at = min(now - self._checked_at, MAX_COUNTED_S), now
        if self._waiting:
            self._silence_s += passed
        elif now - self._probed_at >= PROBE_INTERVAL_S:
            self._waiting, self._probed_at, self._silence_s = True, now, 0.0
            self._probe()
        return self._waiting and self._silence_s > self._limit_s * min(slowdown(), MAX_SLOWDOWN)
