"""Ranks that do not go on, played by the test: how long they may be silent, and one that fails alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardit.core.comm import group, p2p
from shardit.core.runtime.program import Interrupted, Program
from shardit.core.runtime.request_loop import RequestLoop, Schedule
from shardit.engine.process import hangs as hang_detector
from shardit.engine.process.channel import Channel
from shardit.engine.process.messages import Cancel, RequestFailed, RequestFinished
from shardit.engine.process.stacks import waits_for_peer
from shardit.engine.rank.outcomes import ReceivedRequest
from shardit.engine.rank.programs import Programs
from shardit.engine.rank.serving import ServingWorker
from shardit.server.supervisor import running
from shardit.server.supervisor.silence_limit import MAX_SIZES, MIN_LIMIT_S, SilenceLimit
from tests.support.played import Server, played_server


@pytest.fixture
def server(tmp_path: Path, request: Any) -> Iterator[Server]:
    with played_server(tmp_path, **getattr(request, "param", {"pipeline_parallel_size": 2})) as made:
        yield made


@pytest.fixture(autouse=True)
def load(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The load average, as many times the number of cores."""
    times = [0.5]
    monkeypatch.setattr(hang_detector.os, "getloadavg", lambda: (times[0] * (os.cpu_count() or 1), 0.0, 0.0))
    return times


# Hangs.


def test_ranks_of_a_loaded_machine_have_more_time(
    server: Server, monkeypatch: pytest.MonkeyPatch, load: list[float]
) -> None:
    now = [1000.0]
    for module in (hang_detector, running):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    server.put()
    now[0] += 601
    assert server.jobs.hang_detector.overdue() is not None
    load[0] = 3.0
    assert server.jobs.hang_detector.overdue() is None
    now[0] += 1200
    assert server.jobs.hang_detector.overdue() is not None


def test_limit_of_silence_is_learned() -> None:
    silence_limit = SilenceLimit(600)
    small, large = ("small",), ("large",)
    assert silence_limit.bound([small]) == 600
    silence_limit.record(small, 1.0)
    assert silence_limit.bound([small]) == 600  # it has not ended yet
    silence_limit.completed(small)
    assert silence_limit.bound([small]) == MIN_LIMIT_S
    silence_limit.record(small, 7.0)
    silence_limit.record(small, 3.0)
    assert silence_limit.bound([small]) == 35
    assert silence_limit.bound([small, small]) == 70
    assert silence_limit.bound([small, large]) == 600


def test_ranks_that_have_just_started_have_more_time() -> None:
    silence_limit = SilenceLimit(600)
    first, quick = ("first",), ("quick",)
    silence_limit.record(first, 40.0)  # it loaded kernels and connected
    silence_limit.completed(first)
    silence_limit.record(quick, 0.1)
    silence_limit.completed(quick)
    assert silence_limit.bound([quick]) == MIN_LIMIT_S
    silence_limit.cold = True
    assert silence_limit.bound([quick]) == pytest.approx(5 * 40.1)
    silence_limit.completed(quick)
    assert silence_limit.bound([quick]) == MIN_LIMIT_S


def test_a_hang_is_found(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    for module in (hang_detector, running):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    assert server.jobs.hang_detector.overdue() is None
    first = server.put()
    now[0] += 599
    assert server.jobs.hang_detector.overdue() is None
    server.step(first)
    now[0] += 599
    assert server.jobs.hang_detector.overdue() is None
    now[0] += 2
    assert server.jobs.hang_detector.overdue() == ("no progress for 601 s", [0, 1])
    server.complete(first)
    now[0] += 10_000  # idle ranks say nothing
    assert server.jobs.hang_detector.overdue() is None
    second = server.put()
    assert server.jobs.hang_detector.overdue() is None
    now[0] += 5 * 601 - 1  # the longest silence that was none, at this size
    assert server.jobs.hang_detector.overdue() is None
    now[0] += 2
    assert server.jobs.hang_detector.overdue() is not None
    server.die()
    assert server.running() == [second]
    assert server.jobs.hang_detector.overdue() is None


def test_a_rank_that_fails_alone_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(hang_detector.time, "monotonic", lambda: now[0])
    job_id = server.put()
    server.jobs.on_rank_message(1, RequestFailed(server.key(job_id), "KeyError: 'x'"))
    now[0] += 601
    reason = "no progress for 601 s; rank 1 failed: it alone ended a request: KeyError: 'x'"
    assert server.jobs.hang_detector.overdue() == (reason, [0, 1])


@pytest.mark.parametrize("server", [{"data_parallel_size": 2}], indirect=True)
def test_a_hang_of_one_replica_is_found(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(hang_detector.time, "monotonic", lambda: now[0])
    first, _ = server.put(), server.put()
    for _ in range(100):
        now[0] += 7
        server.step(first)
    assert server.jobs.hang_detector.overdue() is not None


def test_silence_limit_forgets_sizes_of_long_ago() -> None:
    silence_limit = SilenceLimit(600)
    often = ("often",)
    for number in range(2 * MAX_SIZES):
        silence_limit.record((number,), 3.0)
        silence_limit.completed((number,))
        silence_limit.record(often, 4.0)
        silence_limit.completed(often)
    assert silence_limit.bound([often]) == 20
    assert silence_limit.bound([(2 * MAX_SIZES - 1,)]) == 15
    assert silence_limit.bound([(0,)]) == 600
    assert len(silence_limit._slowest) == len(silence_limit._known) == MAX_SIZES


# Ranks that fail alone.

WAITS = 'Thread 0x1 (most recent call first):\n  File "/x/torch/distributed/distributed_c10d.py", line {} in recv\n'
WORKS = 'Thread 0x1 (most recent call first):\n  File "/x/torch/nn/functional.py", line {} in linear\n'


def test_messages_between_ranks_are_in_the_package_that_stacks_know() -> None:
    frame = 'Thread 0x1 (most recent call first):\n  File "{}", line 1 in wait\n'
    assert all(waits_for_peer(frame.format(module.__file__)) for module in (group, p2p))
    assert not waits_for_peer(frame.format(hang_detector.__file__))


def look(server: Server, monkeypatch: pytest.MonkeyPatch, *stacks: str) -> None:
    """The next look of the supervisor, which finds the ranks so."""
    server.rank_group.stacks = dict(enumerate(stacks))
    server.jobs.check()


def test_ranks_waiting_for_a_failed_rank_are_restarted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = server.put()
    look(server, monkeypatch, WAITS.format(1), WAITS.format(2))
    assert server.rank_group.reads == 0  # nobody has failed
    server.jobs.on_rank_message(1, RequestFailed(server.key(job_id), "KeyError: 'x'"))
    look(server, monkeypatch, WORKS.format(1), WAITS.format(2))  # it may come to fail, too
    look(server, monkeypatch, WORKS.format(1), WAITS.format(2))
    look(server, monkeypatch, WAITS.format(1), WAITS.format(2))
    look(server, monkeypatch, WAITS.format(3), WAITS.format(2))  # it has gone on
    assert server.rank_group.failures == []
    look(server, monkeypatch, WAITS.format(3), WAITS.format(2))
    assert server.rank_group.failures == ["rank 1 failed: it alone ended a request: KeyError: 'x'"]
    assert (server.state(job_id), server.job(job_id).deaths_alone) == ("queued", 1)


@pytest.mark.parametrize("stacks", [("", ""), (WAITS.format(1), "")])
def test_ranks_without_readable_stacks_get_more_time(
    server: Server, monkeypatch: pytest.MonkeyPatch, stacks: tuple[str, str]
) -> None:
    job_id = server.put()
    server.jobs.on_rank_message(1, RequestFailed(server.key(job_id), "KeyError: 'x'"))
    for _ in range(5):
        look(server, monkeypatch, *stacks)
    assert server.rank_group.failures == []


@pytest.mark.parametrize("server", [{"pipeline_parallel_size": 2, "data_parallel_size": 2}], indirect=True)
def test_other_replicas_continue_during_a_hang(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = server.put(), server.put()
    server.jobs.on_rank_message(2, RequestFailed(server.key(second), "KeyError: 'x'"))
    for line in range(2):
        look(server, monkeypatch, WORKS.format(line), WORKS.format(line), WAITS.format(1), WAITS.format(2))
    assert server.rank_group.failures == ["rank 2 failed: it alone ended a request: KeyError: 'x'"]
    assert [server.state(one) for one in (first, second)] == ["queued", "queued"]


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_failure_after_another_rank_finished(server: Server, cancelled: bool, order: int) -> None:
    job_id = server.put()
    key = server.key(job_id)
    for rank, message in [
        (0, RequestFinished(key, "sum", cancelled=cancelled)),
        (1, RequestFailed(key, "KeyError: 'x'")),
    ][::order]:
        assert server.rank_group.failures == []
        server.jobs.on_rank_message(rank, message)
    (reason,) = server.rank_group.failures
    assert "KeyError: 'x'" in reason


def test_all_ranks_that_fail_alike_are_left_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = server.put()
    key = server.key(job_id)
    for rank in range(2):
        server.jobs.on_rank_message(rank, RequestFailed(key, "ValueError: height"))
    for _ in range(5):
        look(server, monkeypatch, WAITS.format(1), WAITS.format(2))
    server.jobs.on_rank_message(0, RequestFinished(key, "sum", error="ValueError: height"))
    look(server, monkeypatch, WAITS.format(1), WAITS.format(2))
    server.jobs.on_rank_message(1, RequestFinished(key, "sum", error="ValueError: height"))
    assert server.state(job_id) == "failed"
    assert server.rank_group.failures == []
    assert server.rank_group.reads == 0


class _TwoSegments:
    """A call in flight over two segments of one rank."""

    owners = (0, 0)
    finished = False

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_a_cancelled_job_leaves_when_its_calls_in_flight_have_ended() -> None:
    schedule = Schedule(0)
    flight: Any = _TwoSegments()
    schedule.start(flight)
    said: list[tuple[bool, bool]] = []
    channel = SimpleNamespace(send=lambda left: said.append((left.cancelled, flight.finished)))
    session = SimpleNamespace(
        replica=None,
        loop=SimpleNamespace(schedule=schedule),
        mesh=SimpleNamespace(sizes={"pp": 2}, rank=0),
        model=SimpleNamespace(batcher=None),
        leads=False,
        waited_s=0.0,
        spec=SimpleNamespace(of_server=True),
    )
    worker = ServingWorker(session, channel)  # pyright: ignore[reportArgumentType]
    program = Program(lambda: None, 1, error=Interrupted())
    assert isinstance(worker.requests, Programs)
    worker.requests.running[program] = ReceivedRequest(7, SimpleNamespace())
    assert not flight.finished
    worker.finish(program)
    assert said == [(True, True)]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_job_cancelled_in_a_step_without_a_pause_begins_no_other(stages: int) -> None:
    """As a first call of a new size is, which takes its step in one turn."""
    ours, theirs = socket.socketpair()
    supervisor, channel = Channel(ours), Channel(theirs)
    loop, began = RequestLoop(Schedule(0)), list[int]()

    def program(request: Any, report: Any) -> Program:
        def run() -> None:
            report(0, 0, 9)
            for step in range(1, 10):
                began.append(step)
                if step == 1:
                    supervisor.send(Cancel(7))
                report(0, step, 9)

        return Program(run, 1)

    session = SimpleNamespace(
        replica=None,
        loop=loop,
        mesh=SimpleNamespace(sizes={"pp": stages}, rank=0),
        model=SimpleNamespace(batcher=None),
        leads=True,
        waited_s=0.0,
        spec=SimpleNamespace(of_server=True, max_in_flight=1),
        program=program,
    )
    worker = ServingWorker(session, channel)
    worker.requests.add(ReceivedRequest(7, SimpleNamespace()))
    for one in loop.rounds(worker.admit, lambda active: active > 0):
        worker.finish(one)
        assert isinstance(one.error, Interrupted)
    assert began == [1]
