"""How jobs end where the store or a result cannot be written, where the server stops, and after faults of our own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardit.diffusion.output.output import Output
from shardit.engine.process.failure import Failure
from shardit.engine.process.loop import Loop
from shardit.server.http.answers.waiting import check_completed
from shardit.server.http.schema.errors import ApiError
from tests.support.played import INFO, Server, broken, played_server


@pytest.fixture
def server(tmp_path: Path, request: Any) -> Iterator[Server]:
    with played_server(tmp_path, **getattr(request, "param", {"pipeline_parallel_size": 2})) as made:
        yield made


# The store.


def test_a_full_disk_delays_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [server.put() for _ in range(3)]
    real = server.store.finish
    monkeypatch.setattr(server.store, "finish", broken)
    server.complete(ids[0])
    assert server.state(ids[0]) == "in_progress"
    server.jobs.finisher.retry_writes()
    assert server.running() == ids[1:]  # the ranks go on
    monkeypatch.setattr(server.store, "finish", real)
    server.jobs.finisher.retry_writes()
    assert server.state(ids[0]) == "completed"
    assert server.jobs.finisher.all_written
    assert [event for event, _ in server.log.lines].count("store_failed") == 1


def test_a_store_that_fails_altogether_for_a_while(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [server.put() for _ in range(4)]
    with monkeypatch.context() as patch:
        for name in ("start", "finish", "requeue", "queued", "to_cancel", "get", "remember"):
            patch.setattr(server.store, name, broken)
        server.leave(ids[0])
        server.write()
        server.jobs.wake()
        server.jobs.down(Failure("rank 0 has ended"))
        server.jobs.ready([INFO] * server.rank_group.size)
        server.jobs.finisher.retry_writes()
        assert not server.jobs.running
    server.jobs.finisher.retry_writes()
    server.jobs.wake()
    assert server.state(ids[0]) == "completed"
    assert server.running() == ids[1:3]
    server.finish_all()
    assert {server.state(one) for one in ids} == {"completed"}


def test_results_that_cannot_be_written(server: Server) -> None:
    first, second = server.put(), server.put()
    folder = server.store.files_of(first)
    folder.rmdir()
    folder.write_text("not a folder")
    server.complete(first)
    error = server.job(first).error
    assert error is not None
    assert error["code"] == "storage"
    assert "\n" not in error["message"]
    server.complete(second)
    assert server.state(second) == "completed"


def test_an_empty_result_is_a_mistake_of_the_request(server: Server) -> None:
    job_id = server.put()
    server.leave(job_id, made=Output("a cat", 1, audio=np.zeros((1, 1, 0), "f4"), sample_rate=8000))
    server.write()
    assert server.job(job_id).error == {
        "code": "generation_failed",
        "message": "nothing to save, the sound has no samples; ask for a longer one",
    }
    with pytest.raises(ApiError) as caught:
        check_completed(server.job(job_id))
    assert caught.value.status == 400


def test_results_that_vanish_before_they_are_recorded(server: Server) -> None:
    job_id = server.put()
    server.leave(job_id)
    server.writer.write()
    for path in server.store.files_of(job_id).iterdir():
        path.unlink()
    server.write()
    assert server.state(job_id) == "failed"
    assert server.job(job_id).error["code"] == "storage"  # type: ignore[index]


def test_put_back_at_the_stop(server: Server) -> None:
    ids = [server.put() for _ in range(4)]
    server.leave(ids[0])
    server.store.request_cancel(ids[1])
    server.jobs.requeue_all()
    server.write()
    assert [server.state(one) for one in ids] == ["completed", "cancelled", "queued", "queued"]
    assert server.store.recover() == []


def test_nothing_begins_at_the_stop(server: Server) -> None:
    job_id = server.put()
    server.jobs.requeue_all()
    server.jobs.wake()  # the API process has something, while results are being written
    assert server.state(job_id) == "queued"
    assert server.running() == []


# Faults of our own.


def test_jobs_that_a_fault_lost_run_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [server.put() for _ in range(3)]
    real = server.jobs.finisher.write
    monkeypatch.setattr(server.jobs.finisher, "write", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        server.leave(ids[0])
    assert server.state(ids[0]) == "in_progress"
    assert server.running() == ids[1:]
    server.jobs.find_lost()
    assert server.state(ids[0]) == "queued"
    monkeypatch.setattr(server.jobs.finisher, "write", real)
    server.leave(ids[1])
    server.jobs.find_lost()  # its result is being written
    server.write()
    server.finish_all()
    assert {server.state(one) for one in ids} == {"completed"}


def test_repeated_error_of_a_job_ends_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.jobs.finisher, "write", lambda *_, **__: 1 / 0)
    job_id = server.put()
    for _ in range(10):
        with contextlib.suppress(ZeroDivisionError, StopIteration):
            server.leave(job_id)
        server.jobs.find_lost()
        server.jobs.wake()
    assert server.state(job_id) == "failed"


def test_job_that_cannot_be_built_does_not_block_others(server: Server) -> None:
    ids = [server.put(), server.put(width="x"), server.put()]
    assert server.state(ids[1]) == "failed"
    assert server.running() == [ids[0], ids[2]]


def test_the_loop_outlives_faults() -> None:
    told: list[Exception] = []
    loop = Loop(lambda: 1 / 0, every_s=0.01, on_error=told.append)  # type: ignore[arg-type, return-value]
    loop.call(lambda: {}["x"])  # type: ignore[arg-type]
    timer = threading.Timer(0.2, loop.call, (loop.stop,))
    timer.start()
    loop.run()
    assert {type(error) for error in told} == {KeyError, ZeroDivisionError}
