"""Limits the idle time of a connection: uvicorn's own protocol has no limit before the head of a request is complete,
and none for clients that do not read their answers."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_PROBE = re.compile(rb"(?:GET|HEAD) /(?:health|ready) HTTP/1\.1\r\n")


class IdleTimeoutProtocol(AutoHTTPProtocol):  # pyright: ignore[reportGeneralTypeIssues]
    """uvicorn's protocol with a check of each connection every `idle_timeout_s`: it is closed if nothing has happened
    since the last check, although its client was expected to send or to read."""

    idle_timeout_s = 30.0
    """Time limit for a client to send the head of a request, and to read some of an answer, in seconds each."""

    transport: asyncio.Transport
    cycle: Any  # of the newest request; None before the first
    loop: asyncio.AbstractEventLoop
    _timer: asyncio.TimerHandle | None = None
    _seen: tuple[Any, int, int] = (None, 0, 0)
    _resumed = 0
    _full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Handle a new connection."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.idle_timeout_s, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of a connection."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handle data of a request."""
        super().data_received(_with_host(data) if self.cycle is None else data)

    def pause_writing(self) -> None:
        """Handle a write buffer that is too full."""
        self._full = True
        super().pause_writing()

    def resume_writing(self) -> None:
        """Handle a write buffer that has been read in part."""
        self._full = False
        self._resumed += 1
        super().resume_writing()

    def _check(self) -> None:
        sends = self.cycle is None or self.cycle.response_complete  # the client is expected to send a request
        now = (self.cycle, self._resumed, self.transport.get_write_buffer_size())
        if (sends or self._full) and now == self._seen:
            self.transport.abort()  # to close it would wait until all was read
            return
        self._seen = now
        self._timer = self.loop.call_later(self.idle_timeout_s, self._check)


def _with_host(data: bytes) -> bytes:
    """Add a Host header to the head of a probe. The parser refuses HTTP/1.1 without one, as it must, but service
    monitors often send only the two lines that suffice for an answer."""
    found = _PROBE.match(data)
    if found is None or not data.endswith(b"\r\n\r\n") or b"\r\nhost:" in data.lower():
        return data
    return data[: found.end()] + b"Host: localhost\r\n" + data[found.end() :]
