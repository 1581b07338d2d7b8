"""Ranks that die or run out of memory, played by the test: the outcome of their jobs, and the search for the cause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardit.engine.process.failure import Failure
from shardit.engine.process.messages import OutOfMemory, RequestFinished
from shardit.server.supervisor.dispatch import SUSPECT_AFTER
from shardit.server.supervisor.finish import MAX_DEATHS_ALONE
from tests.support.played import INFO, Server, played_server


@pytest.fixture
def server(tmp_path: Path, request: Any) -> Iterator[Server]:
    with played_server(tmp_path, **getattr(request, "param", {"pipeline_parallel_size": 2})) as made:
        yield made


# Deaths.


def test_disagreeing_ranks_are_restarted(server: Server) -> None:
    first, second = server.put(), server.put()
    key = server.key(first)
    server.jobs.on_rank_message(0, RequestFinished(key, "one sum"))
    server.jobs.on_rank_message(1, RequestFinished(key, "another"))
    (reason,) = server.rank_group.failures
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
    """Any number of deaths during several jobs: two at a time, and the first is always queued again."""
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
        server.jobs.requeue_all()
        assert server.state(job_id) == "queued"
        server.jobs.ready([INFO] * server.rank_group.size)
    server.die()
    assert server.state(job_id) == "in_progress"
    assert (server.job(job_id).attempts, server.job(job_id).deaths_alone) == (22, 1)


def out_of_memory(server: Server, job_id: str) -> None:
    """As the rank group does it."""
    server.jobs.on_rank_message(0, OutOfMemory(server.key(job_id), "tried to allocate 9 GiB"))
    server.jobs.down(Failure("rank 0 ran out of memory", memory=True))
    server.jobs.ready([INFO] * server.rank_group.size)


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


def test_out_of_memory_next_to_other_jobs_fails_that_job_alone(server: Server) -> None:
    ids = [server.put(height=512, width=512), server.put(height=4096, width=4096), server.put(), server.put()]
    for _ in range(30):
        if ids[1] in server.running():
            out_of_memory(server, ids[1])
        elif running := server.running():
            server.complete(running[0])
    assert server.job(ids[1]).error["code"] == "out_of_memory"  # type: ignore[index]
    assert [server.state(one) for one in ids if one != ids[1]] == ["completed"] * 3
    assert all(server.job(one).deaths == 0 for one in ids)
