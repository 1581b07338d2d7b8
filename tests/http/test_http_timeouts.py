"""Connections of idle clients are closed; those of slow clients are not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from shardit.server.http.timeouts import IdleTimeoutProtocol
from tests.support.http_fake import WAIT_S

LARGE = 64 * 1024**2
HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


class QuickTimeout(IdleTimeoutProtocol):
    idle_timeout_s = 0.5


async def app(scope: Any, receive: Any, send: Any) -> None:
    """A small answer; a large one at /large; one that takes its time at /late."""
    if scope["path"] == "/late":
        await asyncio.sleep(4 * QuickTimeout.idle_timeout_s)
    content = bytes(LARGE if scope["path"] == "/large" else 2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(content))]})
    await send({"type": "http.response.body", "body": content})


@pytest.fixture
def port() -> Iterator[int]:
    config = uvicorn.Config(app, http=QuickTimeout, log_level="critical", lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), WAIT_S)
    sock.settimeout(WAIT_S)
    return sock


def ended(sock: socket.socket) -> bool:
    """Whether the other end gives up, without a word."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", HEAD[:9], HEAD, HEAD + b"Cookie: "])
def test_heads_that_do_not_come(port: int, sent: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(sent)
        assert ended(sock)


def test_heads_that_trickle(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(HEAD + b"Cookie: ")
        until = time.monotonic() + WAIT_S
        with contextlib.suppress(OSError):
            while time.monotonic() < until:
                sock.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() < until


def test_after_an_answer_too(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(HEAD + b"\r\n")
        answer = b""
        while not answer.endswith(b"\r\n\r\n\0\0"):
            answer += sock.recv(1000)
        sock.sendall(HEAD)
        assert ended(sock)


def test_answers_that_nobody_reads(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(HEAD.replace(b"/ ", b"/large ", 1) + b"\r\n")
        time.sleep(4 * QuickTimeout.idle_timeout_s)
        got = 0
        try:
            while piece := sock.recv(1024**2):
                got += len(piece)
        except ConnectionResetError:
            pass
        assert got < LARGE


def test_slow_readers_get_the_whole_answer(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(HEAD.replace(b"/ ", b"/large ", 1) + b"Connection: close\r\n\r\n")
        got = 0
        while piece := sock.recv(4 * 1024**2):
            got += len(piece)
            time.sleep(0.05)
        assert got > LARGE


def test_late_answers_reach_waiting_clients(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(HEAD.replace(b"/ ", b"/late ", 1) + b"\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
