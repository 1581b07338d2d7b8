"""Errors on the server's side have answers in the same format as all others."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from shardit.server.http.middleware import HttpMiddleware
from shardit.server.http.state.metrics import HttpMetrics
from shardit.server.jobs.job import NewJob
from shardit.server.jobs.store import Store
from shardit.server.options import ServeOptions
from tests.support.http_calls import NOW, error_of
from tests.support.http_fake import WAIT_S, Served, serving


def test_a_fault_is_answered_with_all_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def broken(*_: Any) -> None:
        raise ValueError("nobody has thought of this")

    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    metrics = HttpMetrics()
    middleware = HttpMiddleware(broken, ServeOptions("tiny/flux", tmp_path), metrics, lambda _: True)
    scope = {"type": "http", "method": "GET", "path": "/x", "headers": [(b"host", b"127.0.0.1")]}
    asyncio.run(middleware(scope, None, send))  # type: ignore[arg-type]
    start, body = said
    assert start["status"] == 500
    assert {b"x-request-id", b"x-content-type-options"} <= {name for name, _ in start["headers"]}
    assert json.loads(body["body"])["error"]["code"] == "internal_error"
    assert "nobody has thought of this" in capsys.readouterr().err
    assert b'status="500"' in metrics.text()


def test_a_client_that_goes_in_the_middle_of_its_body_is_no_fault(images: Served) -> None:
    before = len(images.log.read_text())
    with socket.create_connection(("127.0.0.1", images.port), WAIT_S) as client:
        head = f"POST {NOW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        client.sendall(head.encode() + b'{"prompt"')
        time.sleep(0.3)
    until = time.monotonic() + WAIT_S
    while '"status": 499' not in (said := images.log.read_text()[before:]):
        assert time.monotonic() < until, said
        time.sleep(0.02)
    assert "Traceback" not in said
    assert '"event": "error"' not in said


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    """As on a full disk. The process starts nevertheless, and reports the error."""
    store = Store(tmp_path)
    store.accept(NewJob("image", {"prompt": "a cat"}, 1, 1.0, waits=True), queue_size=1)
    store.close()
    (file,) = tmp_path.glob("*.sqlite")
    with sqlite3.connect(file) as database:
        for event in ("UPDATE", "INSERT"):
            stop = "BEGIN SELECT RAISE(FAIL, 'the disk is full'); END"
            database.execute(f"CREATE TRIGGER full_{event} BEFORE {event} ON jobs {stop}")
    database.close()
    with serving(tmp_path) as served:
        error = error_of(served, NOW, {"prompt": "a cat", "size": "64x64"}, 503)
        assert error["code"] == "storage"
        assert "the disk is full" in error["message"]
        assert served.call("GET", "/health")[0] == 200
