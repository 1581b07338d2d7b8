"""Heartbeat of the API process: a hung or stopped process does not exit, so only a missed beat reveals it."""

from __future__ import annotations

import time
from collections.abc import Callable

from shardit.engine.process.hangs import slowdown

ASK_EVERY_S = 1.0
GRACE_S = 10.0
"""Longest silence of an event loop, in seconds, that is not a hang; longer on a loaded machine (`slowdown`)."""
START_S = 60.0
"""The same before the first answer: the process starts and imports."""
MAX_STEP_S = 5.0
"""Upper limit of the silence counted between two checks, in seconds. If the supervisor itself has stood still (a
suspended machine, a stuck disk), the process gets a chance to answer first."""
MAX_SLOWDOWN = 6.0
"""Upper limit of the factor for a loaded machine."""


class Heartbeat:
    """Calls `ask()` regularly; call `answered` from any thread when an answer arrives."""

    def __init__(self, ask: Callable[[], None]):
        self._ask = ask
        self._waits = False
        self._asked_at = -ASK_EVERY_S
        self._looked_at = time.monotonic()
        self._silence_s, self._grace_s = 0.0, START_S

    def answered(self) -> None:
        """Record an answer."""
        self._waits, self._grace_s = False, GRACE_S

    def hangs(self) -> bool:
        """Return whether it has been silent for too long. To be called a few times per second."""
        now = time.monotonic()
        passed, self._looked_at = min(now - self._looked_at, MAX_STEP_S), now
        if self._waits:
            self._silence_s += passed
        elif now - self._asked_at >= ASK_EVERY_S:
            self._waits, self._asked_at, self._silence_s = True, now, 0.0
            self._ask()
        return self._waits and self._silence_s > self._grace_s * min(slowdown(), MAX_SLOWDOWN)
