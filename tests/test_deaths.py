"""Ranks that die, run out of memory or hang, played by the test: what becomes of their jobs, and who is the cause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardit.engine.messages import Ended, Left, OutOfMemory
from shardit.server import running, vigil
from shardit.server.dispatch import SUSPECT_AFTER
from shardit.server.ends import MAX_DEATHS_ALONE
from shardit.server.fleet import Down
from shardit.server.vigil import MAX_SIZES, MIN_PATIENCE_S, Patience

from .played import INFO, Server, played_server


@pytest.fixture
def server(tmp_path: Path, request: Any) -> Iterator[Server]:
    with played_server(tmp_path, **getattr(request, "param", {"pipeline_parallel_size": 2})) as made:
        yield made


# Deaths.


def test_ranks_that_differ_are_started_anew(server: Server) -> None:
    first, second = server.put(), server.put()
    key = server.key(first)
    server.jobs.heard(0, Left(key, "one sum"))
    server.jobs.heard(1, Left(key, "another"))
    (reason,) = server.fleet.failures
    assert first in reason
    assert [server.state(one) for one in (first, second)] == ["queued", "queued"]


def test_deaths_put_jobs_back_in_order(server: Server) -> None:
    ids = [server.put() for _ in range(4)]
    server.die()
    assert server.running() == ids[:2]
    assert [server.job(one).attempts for one in ids] == [2, 2, 0, 0]


def test_the_cause_is_found_and_the_others_complete(server: Server) -> None:
    """One job kills the ranks whenever it runs."""
    ids = [server.put() for _ in range(5)]
    guilty, deaths = ids[1], 0
    for _ in range(40):
        if guilty in server.running():
            deaths += 1
            server.die("rank 0 has ended: SIGKILL")
        elif running := server.running():
            server.complete(running[0])
    assert server.job(guilty).error["code"] == "ranks_died"  # type: ignore[index]
    assert "3 times while this job ran alone" in server.job(guilty).error["message"]  # type: ignore[index]
    assert "SIGKILL" in server.job(guilty).error["message"]  # type: ignore[index]
    assert deaths == SUSPECT_AFTER + MAX_DEATHS_ALONE
    assert all(server.state(one) == "completed" for one in ids if one != guilty)


def test_a_suspect_runs_alone(server: Server) -> None:
    ids = [server.put() for _ in range(4)]
    for _ in range(SUSPECT_AFTER):
        assert server.running() == ids[:2]
        server.die()
    assert server.running() == ids[:1]
    server.jobs.wake()
    assert server.running() == ids[:1]
    server.complete(ids[0])
    assert server.running() == ids[1:2]
    server.complete(ids[1])
    assert server.running() == ids[2:]


@pytest.mark.parametrize("server", [{"data_parallel_size": 2}], indirect=True)
def test_a_suspect_runs_alone_on_all_replicas(server: Server) -> None:
    ids = [server.put() for _ in range(5)]
    for _ in range(SUSPECT_AFTER):
        server.die()
    assert server.running() == ids[:1]


def test_deaths_of_others_fail_nobody(server: Server) -> None:
    """However often ranks die beside others: two at a time, and the first is always put back."""
    ids = [server.put() for _ in range(6)]
    for _ in range(60):
        if not (running := server.running()):
            break
        if len(running) > 1:
            server.die()
        else:
            server.complete(running[0])
    assert {server.state(one) for one in ids} == {"completed"}


def test_stops_and_restarts_do_not_count(server: Server) -> None:
    job_id = server.put()
    for _ in range(20):
        server.jobs.put_all_back()
        assert server.state(job_id) == "queued"
        server.jobs.ready([INFO] * server.fleet.size)
    server.die()
    assert server.state(job_id) == "in_progress"
    assert (server.job(job_id).attempts, server.job(job_id).deaths_alone) == (22, 1)


def out_of_memory(server: Server, job_id: str) -> None:
    """As the fleet does it."""
    server.jobs.heard(0, OutOfMemory(server.key(job_id), "tried to allocate 9 GiB"))
    server.jobs.down(Down("rank 0 ran out of memory", memory=True))
    server.jobs.ready([INFO] * server.fleet.size)


def test_out_of_memory_fails_that_job_only(server: Server) -> None:
    large = server.put(height=4096, width=4096)
    out_of_memory(server, large)
    others = [server.put() for _ in range(3)]
    error = server.job(large).error
    assert error is not None
    assert error["code"] == "out_of_memory"
    assert "width=4096, height=4096" in error["message"]
    assert "9 GiB" in error["message"]
    assert server.job(large).attempts == 1
    server.finish_all()
    assert {server.state(one) for one in others} == {"completed"}


def test_out_of_memory_beside_others_ends_with_it_alone(server: Server) -> None:
    ids = [server.put(height=512, width=512), server.put(height=4096, width=4096), server.put(), server.put()]
    for _ in range(30):
        if ids[1] in server.running():
            out_of_memory(server, ids[1])
        elif running := server.running():
            server.complete(running[0])
    assert server.job(ids[1]).error["code"] == "out_of_memory"  # type: ignore[index]
    assert [server.state(one) for one in ids if one != ids[1]] == ["completed"] * 3
    assert all(server.job(one).deaths == 0 for one in ids)


# Hangs.


def test_patience_is_learned() -> None:
    patience = Patience(600)
    small, large = ("small",), ("large",)
    assert patience.bound([small]) == 600
    patience.saw(small, 1.0)
    assert patience.bound([small]) == 600  # it has not ended yet
    patience.completed(small)
    assert patience.bound([small]) == MIN_PATIENCE_S
    patience.saw(small, 7.0)
    patience.saw(small, 3.0)
    assert patience.bound([small]) == 35
    assert patience.bound([small, small]) == 70
    assert patience.bound([small, large]) == 600


def test_ranks_that_have_just_started_have_more_time() -> None:
    patience = Patience(600)
    first, quick = ("first",), ("quick",)
    patience.saw(first, 40.0)  # it loaded kernels and connected
    patience.completed(first)
    patience.saw(quick, 0.1)
    patience.completed(quick)
    assert patience.bound([quick]) == MIN_PATIENCE_S
    patience.cold = True
    assert patience.bound([quick]) == pytest.approx(5 * 40.1)
    patience.completed(quick)
    assert patience.bound([quick]) == MIN_PATIENCE_S


def test_a_hang_is_found(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    for module in (vigil, running):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    assert server.jobs.vigil.overdue() is None
    first = server.put()
    now[0] += 599
    assert server.jobs.vigil.overdue() is None
    server.step(first)
    now[0] += 599
    assert server.jobs.vigil.overdue() is None
    now[0] += 2
    assert server.jobs.vigil.overdue() == "no sign of life for 601 s"
    server.complete(first)
    now[0] += 10_000  # idle ranks say nothing
    assert server.jobs.vigil.overdue() is None
    second = server.put()
    assert server.jobs.vigil.overdue() is None
    now[0] += 5 * 601 - 1  # the longest silence that was none, at this size
    assert server.jobs.vigil.overdue() is None
    now[0] += 2
    assert server.jobs.vigil.overdue() is not None
    server.die()
    assert server.running() == [second]
    assert server.jobs.vigil.overdue() is None


def test_a_rank_that_fails_alone_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(vigil.time, "monotonic", lambda: now[0])
    job_id = server.put()
    server.jobs.heard(1, Ended(server.key(job_id), "KeyError: 'x'"))
    now[0] += 601
    assert server.jobs.vigil.overdue() == "no sign of life for 601 s; rank 1 alone failed: KeyError: 'x'"


@pytest.mark.parametrize("server", [{"data_parallel_size": 2}], indirect=True)
def test_a_hang_of_one_replica_is_found(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(vigil.time, "monotonic", lambda: now[0])
    first, _ = server.put(), server.put()
    for _ in range(100):
        now[0] += 7
        server.step(first)
    assert server.jobs.vigil.overdue() is not None


def test_patience_forgets_sizes_of_long_ago() -> None:
    patience = Patience(600)
    often = ("often",)
    for number in range(2 * MAX_SIZES):
        patience.saw((number,), 3.0)
        patience.completed((number,))
        patience.saw(often, 4.0)
        patience.completed(often)
    assert patience.bound([often]) == 20
    assert patience.bound([(2 * MAX_SIZES - 1,)]) == 15
    assert patience.bound([(0,)]) == 600
    assert len(patience._slowest) == len(patience._known) == MAX_SIZES


# Ranks that fail alone.

WAITS = 'Thread 0x1 (most recent call first):\n  File "/x/torch/distributed/distributed_c10d.py", line {} in recv\n'
WORKS = 'Thread 0x1 (most recent call first):\n  File "/x/torch/nn/functional.py", line {} in linear\n'


def look(server: Server, monkeypatch: pytest.MonkeyPatch, *stacks: str) -> None:
    """The next look of the supervisor, which finds the ranks so."""
    server.fleet.stacks = dict(enumerate(stacks))
    monkeypatch.setattr(vigil, "DOUBT_S", 0.0)
    server.jobs.look_after()


def test_ranks_that_wait_for_one_that_failed_are_started_anew(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = server.put()
    look(server, monkeypatch, WAITS.format(1), WAITS.format(2))
    assert server.fleet.looks == 0  # nobody has failed
    server.jobs.heard(1, Ended(server.key(job_id), "KeyError: 'x'"))
    look(server, monkeypatch, WORKS.format(1), WAITS.format(2))  # it may come to fail, too
    look(server, monkeypatch, WORKS.format(1), WAITS.format(2))
    look(server, monkeypatch, WAITS.format(1), WAITS.format(2))
    look(server, monkeypatch, WAITS.format(3), WAITS.format(2))  # it has gone on
    assert server.fleet.failures == []
    look(server, monkeypatch, WAITS.format(3), WAITS.format(2))
    assert server.fleet.failures == ["rank 1 alone failed: KeyError: 'x'"]
    assert (server.state(job_id), server.job(job_id).deaths_alone) == ("queued", 1)


@pytest.mark.parametrize("stacks", [("", ""), (WAITS.format(1), "")])
def test_ranks_that_cannot_be_looked_at_have_time(
    server: Server, monkeypatch: pytest.MonkeyPatch, stacks: tuple[str, str]
) -> None:
    job_id = server.put()
    server.jobs.heard(1, Ended(server.key(job_id), "KeyError: 'x'"))
    for _ in range(5):
        look(server, monkeypatch, *stacks)
    assert server.fleet.failures == []


@pytest.mark.parametrize("server", [{"pipeline_parallel_size": 2, "data_parallel_size": 2}], indirect=True)
def test_replicas_beside_it_may_work(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = server.put(), server.put()
    server.jobs.heard(2, Ended(server.key(second), "KeyError: 'x'"))
    for line in range(2):
        look(server, monkeypatch, WORKS.format(line), WORKS.format(line), WAITS.format(1), WAITS.format(2))
    assert server.fleet.failures == ["rank 2 alone failed: KeyError: 'x'"]
    assert [server.state(one) for one in (first, second)] == ["queued", "queued"]


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_a_rank_that_fails_where_another_is_through(server: Server, cancelled: bool, order: int) -> None:
    job_id = server.put()
    key = server.key(job_id)
    for rank, message in [(0, Left(key, "sum", cancelled=cancelled)), (1, Ended(key, "KeyError: 'x'"))][::order]:
        assert server.fleet.failures == []
        server.jobs.heard(rank, message)
    (reason,) = server.fleet.failures
    assert "KeyError: 'x'" in reason


def test_all_ranks_that_fail_alike_are_left_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = server.put()
    key = server.key(job_id)
    for rank in range(2):
        server.jobs.heard(rank, Ended(key, "ValueError: height"))
    for _ in range(5):
        look(server, monkeypatch, WAITS.format(1), WAITS.format(2))
    server.jobs.heard(0, Left(key, "sum", error="ValueError: height"))
    look(server, monkeypatch, WAITS.format(1), WAITS.format(2))
    server.jobs.heard(1, Left(key, "sum", error="ValueError: height"))
    assert server.state(job_id) == "failed"
    assert server.fleet.failures == []
    assert server.fleet.looks == 0
