"""An event loop: runs all decisions of a process in one thread."""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable
from typing import Any


class Loop:
    """Runs callbacks posted by other threads, one at a time, and `tick` about every `every_s` seconds.

    on_error(error) is called with errors of callbacks: a failing system call, a full disk, or a bug. The loop
    continues.
    """

    def __init__(
        self, tick: Callable[[], None], every_s: float = 0.25, on_error: Callable[[Exception], None] | None = None
    ):
        self._tick, self._every_s, self._on_error = tick, every_s, on_error
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._stopped = False

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Schedule `function(*args)` to run in the loop. May be called from any thread and from signal handlers."""
        self._queue.put(lambda: function(*args))

    def later(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        """Schedule `function(*args)` to run in the loop after some seconds. To be called in the loop."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), lambda: function(*args)))

    def stop(self) -> None:
        """Leave `run` after the present callback."""
        self._stopped = True

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Run callbacks until `stop`, or until a condition holds."""
        due = time.monotonic()
        while not self._stopped and not until():
            self.step(max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                self._try(self._tick)
                due = time.monotonic() + self._every_s

    def step(self, timeout_s: float) -> None:
        """Run one callback, if one is due within `timeout_s`."""
        if self._timers and (wait_s := self._timers[0][0] - time.monotonic()) <= timeout_s:
            if wait_s <= 0:
                self._try(heapq.heappop(self._timers)[2])
                return
            timeout_s = wait_s
        try:
            function = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return
        self._try(function)

    def _try(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:
            if self._on_error is None:
                raise
            self._on_error(error)
