"""How long a connection may do nothing: uvicorn's own protocol has no limit before the head of a request is complete,
and none for clients that do not read their answers."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_PROBE = re.compile(rb"(?:GET|HEAD) /(?:health|ready) HTTP/1\.1\r\n")

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

    def data_received(self, data: bytes) -> None:
        """Some of a request has come."""
        super().data_received(_with_host(data) if self.cycle is None else data)

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


def _with_host(data: bytes) -> bytes:
    """The head of a probe with a Host header. The parser refuses HTTP/1.1 without one, as it must, but what watches
    over services often sends the two lines that suffice for an answer."""
    found = _PROBE.match(data)
    if found is None or not data.endswith(b"\r\n\r\n") or b"\r\nhost:" in data.lower():
        return data
    return data[: found.end()] + b"Host: localhost\r\n" + data[found.end() :]
