"""How long a connection may do nothing: uvicorn's own protocol has no limit before the head of a request is complete,
and none for clients that do not read their answers."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

PAUSE_S = 30.0
"""A client gets this long to send the head of a request, and as long again to read some of an answer."""


class PatientProtocol(AutoHTTPProtocol):  # pyright: ignore[reportGeneralTypeIssues]
    """uvicorn's protocol, whose connections are looked at every `PAUSE_S`: one on which nothing has happened since the
    last look, though its client was to send or to read, is ended."""

    transport: asyncio.Transport
    cycle: Any  # of the newest request; None before the first
    loop: asyncio.AbstractEventLoop
    _timer: asyncio.TimerHandle | None = None
    _seen: tuple[Any, int, int] = (None, 0, 0)
    _resumed = 0
    _full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(PAUSE_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More waits to be read than is good."""
        self._full = True
        super().pause_writing()

    def resume_writing(self) -> None:
        """Some of it was read."""
        self._full = False
        self._resumed += 1
        super().resume_writing()

    def _look(self) -> None:
        sends = self.cycle is None or self.cycle.response_complete  # it is its turn to send a request
        now = (self.cycle, self._resumed, self.transport.get_write_buffer_size())
        if (sends or self._full) and now == self._seen:
            self.transport.abort()  # to close it would wait until all was read
            return
        self._seen = now
        self._timer = self.loop.call_later(PAUSE_S, self._look)
