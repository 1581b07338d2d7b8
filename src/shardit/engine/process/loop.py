"""One thread of decisions, and the threads that read and write sockets for it."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from shardit.engine.process.channel import Channel, Closed, encode


class Loop:
    """Runs what other threads hand over, one after the other, and `tick` about every `every_s` seconds.

    on_trouble(error) is told what goes wrong: the system or the disk refuses something, or there is a fault of ours.
    The loop goes on.
    """

    def __init__(
        self, tick: Callable[[], None], every_s: float = 0.25, on_trouble: Callable[[Exception], None] | None = None
    ):
        self._tick, self._every_s, self._on_trouble = tick, every_s, on_trouble
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._stopped = False

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Have `function(*args)` run in the loop. May be called from any thread and from signal handlers."""
        self._queue.put(lambda: function(*args))

    def later(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        """Have `function(*args)` run in the loop after some seconds. To be called in the loop."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), lambda: function(*args)))

    def stop(self) -> None:
        """Leave `run` after what is running now."""
        self._stopped = True

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Work until `stop`, or until a condition holds."""
        due = time.monotonic()
        while not self._stopped and not until():
            self.step(max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                self._try(self._tick)
                due = time.monotonic() + self._every_s

    def step(self, timeout_s: float) -> None:
        """Do one thing, if there is one within `timeout_s`."""
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
            if self._on_trouble is None:
                raise
            self._on_trouble(error)


class Pipe:
    """A channel with a thread that reads it and one that writes to it, so that neither side ever waits for the other.

    `on_message(message)` and, once, `on_closed()` are called in the reading thread.
    """

    def __init__(self, channel: Channel, on_message: Callable[[Any], None], on_closed: Callable[[], None]):
        self._channel, self._on_message, self._on_closed = channel, on_message, on_closed
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        channel.socket.settimeout(None)
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    @property
    def backlog(self) -> int:
        """Messages that the other side has not taken yet."""
        return self._out.qsize()

    def send(self, message: Any) -> None:
        """Send a message, soon."""
        self.send_encoded(encode(message))

    def send_encoded(self, parts: Sequence[Any]) -> None:
        """Send what `encode` made, soon: a message for several receivers is pickled once."""
        self._out.put(parts)

    def close(self) -> None:
        """Let go of the channel; what was not sent is lost."""
        self._out.put(_END)
        with contextlib.suppress(OSError):
            self._channel.socket.shutdown(2)

    def _read(self) -> None:
        try:
            with contextlib.suppress(Closed, OSError):
                while True:
                    self._on_message(self._channel.recv())
        finally:  # whatever came: who is no longer heard is gone
            self._on_closed()

    def _write(self) -> None:
        try:
            with contextlib.suppress(Closed, OSError):
                while (message := self._out.get()) is not _END:
                    self._channel.send_encoded(message)
        finally:
            self._channel.close()


_END = object()
