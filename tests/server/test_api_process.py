"""The API process under its supervisor: a hung one is noticed and restarted, with the socket kept."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from shardit.engine.process.channel import Channel
from shardit.engine.process.loop import Loop
from shardit.logs import logger
from shardit.server.entry.serve import listening
from shardit.server.http.main import _config
from shardit.server.http.state.supervisor_client import SupervisorClient
from shardit.server.messages import Ping, Pong
from shardit.server.options import ServeOptions
from shardit.server.process import heartbeat as heartbeat
from shardit.server.process.api_process import ApiProcess, start
from shardit.server.process.heartbeat import (
    HANG_TIMEOUT_S,
    MAX_COUNTED_S,
    MAX_SLOWDOWN,
    PROBE_INTERVAL_S,
    START_TIMEOUT_S,
    Heartbeat,
)

WAIT_S = 120.0


@pytest.mark.parametrize("workers", ["", "many", "4"])
def test_the_number_of_workers_is_no_variable(monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", workers)  # set by container platforms, and read by uvicorn
    assert _config(FastAPI()).workers == 1


class Asked:
    """A heartbeat on a clock of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slowdown: float = 1.0):
        self.now, self.asked = 1000.0, 0
        monkeypatch.setattr(heartbeat, "slowdown", lambda: slowdown)
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)
        self.heartbeat = Heartbeat(self.ask)

    def ask(self) -> None:
        self.asked += 1

    def hangs_after(self, seconds: float, every_s: float = 0.25) -> bool:
        until, hangs = self.now + seconds, False
        while self.now < until:
            self.now += every_s
            hangs = self.heartbeat.hangs()
        return hangs


def test_a_silent_process_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    assert not asked.hangs_after(START_TIMEOUT_S)  # it starts
    asked.heartbeat.answered()
    for _ in range(5):
        before = asked.asked
        assert not asked.hangs_after(PROBE_INTERVAL_S + 0.25)
        assert asked.asked == before + 1
        assert not asked.hangs_after(HANG_TIMEOUT_S - 1.5)
        asked.heartbeat.answered()
    assert not asked.hangs_after(HANG_TIMEOUT_S)
    assert asked.hangs_after(1.0)


def test_a_process_that_never_answers_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Asked(monkeypatch).hangs_after(START_TIMEOUT_S + 1.0)


def test_a_loaded_machine_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    for load, times in ((3.0, 3.0), (1000.0, MAX_SLOWDOWN)):
        asked = Asked(monkeypatch, load)
        assert not asked.hangs_after(times * START_TIMEOUT_S)
        assert asked.hangs_after(2.0)
        asked.heartbeat.answered()
        assert not asked.hangs_after(times * HANG_TIMEOUT_S)
        assert asked.hangs_after(2.0)


def test_paused_supervisor_reports_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    asked.hangs_after(1.0)
    asked.heartbeat.answered()
    asked.hangs_after(PROBE_INTERVAL_S)
    assert not asked.hangs_after(3600.0, every_s=3600.0)
    assert not asked.hangs_after(HANG_TIMEOUT_S - MAX_COUNTED_S - 1.0)  # time to answer
    assert asked.hangs_after(2.0)


def test_the_event_loop_answers_not_a_thread() -> None:
    ours, theirs = (Channel(end, 10.0) for end in socket.socketpair())
    loop = asyncio.new_event_loop()
    delivered: list[Any] = []
    SupervisorClient(theirs, lambda: None).start(loop, delivered.append)
    ours.send(Ping())
    ours.send("news")
    assert not wait([ours], 0.3)  # the loop does not run
    loop.run_until_complete(asyncio.sleep(0.1))
    assert isinstance(ours.recv(), Pong)
    assert delivered == ["news"]
    ours.close()
    loop.close()


class Kept:
    """A supervised API process and its messages."""

    def __init__(self, folder: Path, listener: Any):
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.starts = 0
        self.loop = Loop(lambda: None)
        self.api = ApiProcess(
            ServeOptions("tiny/flux", folder),
            start(listener),
            listener,
            self.loop,
            on_message=lambda message: None,
            on_start=self.note_start,
            log=logger("supervisor"),
        )

    def note_start(self) -> None:
        self.starts += 1

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, "nothing happens"
            self.api.check()
            self.loop.step(0.05)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=0.5) as answer:
                return answer.status == 200
        except OSError:
            return False


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    with listening("127.0.0.1", 0) as listener:
        one = Kept(tmp_path, listener)
        one.api.start()
        yield one
        one.api.terminate()
        one.api.stop()


def test_a_package_that_is_broken_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('cannot import name x from pydantic')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with listening("127.0.0.1", 0) as listener:
        one = Kept(tmp_path, listener)
        one.api.start()
        one.until(lambda: one.api.unable)
        for _ in range(4):
            one.api.check()
        assert one.starts == 1
    err = capfd.readouterr().err
    assert "error: the server cannot answer HTTP: a package cannot be used (cannot import name x from pydantic)" in err


def test_a_hung_api_process_is_restarted(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HANG_TIMEOUT_S", 3.0)
    kept.until(kept.answers)
    first = kept.api.pid
    assert first is not None
    for _ in range(10):
        kept.api.check()
        kept.loop.step(0.25)
    assert kept.starts == 1  # it answers
    os.kill(first, signal.SIGSTOP)
    kept.until(lambda: kept.starts > 1)
    kept.until(kept.answers)  # at the same address
    assert kept.api.pid not in (first, None)
    assert not Path(f"/proc/{first}").exists()
