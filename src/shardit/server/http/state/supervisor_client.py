"""The API process's end of the channel to its supervisor: one thread reads, one writes, so that the event loop never
waits for the other side."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable

from shardit.engine.process.channel import Channel
from shardit.server.messages import Ping, Pong


class SupervisorClient:
    """Passes messages from `channel` to `deliver`, in `loop`; `on_end` is called, in a thread, when the supervisor is
    gone. `Ping` is answered in `loop`, so that the supervisor detects a loop that hangs."""

    def __init__(self, channel: Channel, on_end: Callable[[], None]):
        self._channel = channel
        self._on_end = on_end
        self._outgoing: queue.SimpleQueue[object] = queue.SimpleQueue()

    def send(self, message: object) -> None:
        """Queue a message to be sent."""
        self._outgoing.put(message)

    def start(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[object], None]) -> None:
        """Begin to read and write."""

        def read() -> None:
            try:
                while True:
                    message = self._channel.recv()
                    if isinstance(message, Ping):
                        loop.call_soon_threadsafe(self.send, Pong())
                    else:
                        loop.call_soon_threadsafe(deliver, message)
            except Exception:  # whatever it is, nothing more would arrive
                self._on_end()

        def write() -> None:
            try:
                while True:
                    self._channel.send(self._outgoing.get())
            except Exception:
                self._on_end()

        for name, work in (("from supervisor", read), ("to supervisor", write)):
            threading.Thread(target=work, name=name, daemon=True).start()
