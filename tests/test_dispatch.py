"""What the dispatcher decides, on ranks that are played by the test: slots, cancelling, deaths, hangs, full disks."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shardit.config import DiffusionParallelConfig
from shardit.engine.messages import Begin, Cancel, Ended, Left, OutOfMemory, Progress
from shardit.output import Output
from shardit.server import dispatch, running
from shardit.server.dispatch import MAX_DEATHS_ALONE, SUSPECT_AFTER, Dispatcher
from shardit.server.fleet import Down
from shardit.server.gauges import Gauges
from shardit.server.jobs import Job, NewJob
from shardit.server.loop import Loop
from shardit.server.messages import Changed, Step
from shardit.server.options import ServeOptions
from shardit.server.running import MIN_PATIENCE_S, Patience
from shardit.server.store import Store
from shardit.signature import PipelineSignature

SIGNATURE = PipelineSignature("FakePipeline", ("prompt", "height", "width", "num_inference_steps"))
INFO = {"signature": SIGNATURE, "memory": {"held": 1, "limit": None}}


class FakeFleet:
    def __init__(self, size: int):
        self.size = size
        self.failing = False
        self.sent: list[tuple[int, Any]] = []
        self.failures: list[str] = []

    def send(self, rank: int, message: Any) -> None:
        self.sent.append((rank, message))

    def fail(self, reason: str) -> None:
        self.failures.append(reason)
        self.on_down(Down(reason))

    def on_down(self, down: Down) -> None:
        raise NotImplementedError


class ManualWriter(Executor):
    """Writes when the test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Any, tuple[Any, ...]]] = []

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.work.append((future, fn, args))
        return future

    def write(self) -> None:
        """Do all that was handed over."""
        todo, self.work = self.work, []
        for future, fn, args in todo:
            try:
                future.set_result(fn(*args))
            except Exception as error:
                future.set_exception(error)


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    warning = error = info

    def ends(self) -> list[tuple[str, str]]:
        return [(fields["request_id"], fields["state"]) for event, fields in self.lines if event == "job_ended"]


@dataclass
class Server:
    """A dispatcher, and ranks that answer when told to."""

    store: Store
    jobs: Dispatcher
    fleet: FakeFleet
    writer: ManualWriter
    log: Log
    told: list[Any]
    loop: Loop
    together: int
    count: int = 0
    all: list[str] = field(default_factory=list)

    def put(self, cost: float = 1.0, **request: Any) -> str:
        new = NewJob("image", {"prompt": "a cat", "height": 8, "width": 8, **request}, 1, cost)
        job_id = self.store.accept(new, queue_size=1000)[0].id
        self.all.append(job_id)
        self.jobs.wake()
        return job_id

    def running(self) -> list[str]:
        return [one.job.id for one in self.jobs.running.values()]

    def job(self, job_id: str) -> Job:
        found = self.store.get(job_id)
        assert found is not None
        return found

    def state(self, job_id: str) -> str:
        return self.job(job_id).state

    def key(self, job_id: str) -> int:
        return next(key for key, one in self.jobs.running.items() if one.job.id == job_id)

    def ranks(self, job_id: str) -> range:
        replica = self.jobs.running[self.key(job_id)].replica
        return range(replica * self.together, (replica + 1) * self.together)

    def step(self, job_id: str, step: int = 1, total: int = 4) -> None:
        self.jobs.heard(self.ranks(job_id)[0], Progress(self.key(job_id), step, total))

    def leave(self, job_id: str, **more: Any) -> None:
        """All its ranks are through with a job."""
        key, ranks = self.key(job_id), self.ranks(job_id)
        for rank in ranks:
            good = rank == ranks[0] and not more
            output = Output("a cat", 1, [Image.new("RGB", (8, 8))]) if good else None
            self.jobs.heard(rank, Left(key, None if more.get("cancelled") else "sum", output=output, **more))

    def complete(self, job_id: str) -> None:
        self.leave(job_id)
        self.write()

    def write(self) -> None:
        self.writer.write()
        while self.loop._queue.qsize():
            self.loop.step(0.0)

    def die(self, reason: str = "rank 1 has ended") -> None:
        """The ranks die and come back."""
        self.jobs.down(Down(reason))
        assert not self.jobs.running
        self.jobs.ready([INFO] * self.fleet.size)

    def cancels(self) -> set[int]:
        return {message.key for _, message in self.fleet.sent if isinstance(message, Cancel)}

    def finish_all(self) -> None:
        for _ in range(200):
            for job_id in self.running():
                self.complete(job_id)
            if not self.jobs.running:
                return


@pytest.fixture
def server(tmp_path: Path, request: Any) -> Iterator[Server]:
    sizes = getattr(request, "param", {"pipeline_parallel_size": 2})
    config = DiffusionParallelConfig(**sizes)
    options = ServeOptions("x", tmp_path, config)
    store, fleet, loop = Store(tmp_path), FakeFleet(config.world_size), Loop(lambda: None)
    writer, log, told = ManualWriter(), Log(), []
    jobs = Dispatcher(options, store, fleet, loop, writer, told.append, log, Gauges())  # type: ignore[arg-type]
    jobs.slots = 2
    fleet.on_down = jobs.down  # type: ignore[method-assign]
    made = Server(store, jobs, fleet, writer, log, told, loop, fleet.size // config.data_parallel_size)
    jobs.ready([INFO] * fleet.size)
    yield made
    ends = log.ends()
    assert len({job_id for job_id, _ in ends}) == len(ends), "two ends"
    store.close()


# Slots.


def test_slots_are_filled_in_order(server: Server) -> None:
    ids = [server.put() for _ in range(4)]
    assert server.running() == ids[:2]
    assert [server.state(one) for one in ids] == ["in_progress"] * 2 + ["queued"] * 2
    begins = [(rank, message.key) for rank, message in server.fleet.sent if isinstance(message, Begin)]
    assert begins == [(0, 1), (1, 1), (0, 2), (1, 2)]
    server.leave(ids[1])
    assert server.running() == [ids[0], ids[2]]  # before its result is written
    assert server.state(ids[1]) == "in_progress"
    server.write()
    assert server.state(ids[1]) == "completed"
    server.finish_all()
    assert {server.state(one) for one in ids} == {"completed"}
    assert all((server.store.files_of(one) / server.job(one).files[0]).is_file() for one in ids)
    assert sorted(server.log.ends()) == sorted((one, "completed") for one in ids)


@pytest.mark.parametrize("server", [{"pipeline_parallel_size": 2, "data_parallel_size": 2}], indirect=True)
def test_replicas_share_one_queue(server: Server) -> None:
    ids = [server.put() for _ in range(6)]
    assert [(one.job.id, one.replica) for one in server.jobs.running.values()] == [
        (ids[0], 0),
        (ids[1], 1),
        (ids[2], 0),
        (ids[3], 1),
    ]
    server.complete(ids[1])
    assert server.jobs.running[server.key(ids[4])].replica == 1
    server.finish_all()
    assert {server.state(one) for one in ids} == {"completed"}


def test_nothing_begins_before_the_ranks_are_up_or_while_they_fail(server: Server) -> None:
    server.fleet.failing = True
    first = server.put()
    assert server.running() == []
    server.fleet.failing = False
    server.jobs.down(Down("rank 0 has ended"))
    server.jobs.wake()
    assert server.state(first) == "queued"
    server.jobs.ready([INFO, INFO])
    assert server.running() == [first]


def test_progress_is_told(server: Server) -> None:
    job_id = server.put()
    for step in range(5):
        server.step(job_id, step)
    steps = [message for message in server.told if isinstance(message, Step)]
    assert [(one.step, one.total, one.phase) for one in steps][-2:] == [(3, 4, "denoise"), (4, 4, "decode")]
    assert Changed(job_id) in server.told


def test_a_request_that_no_longer_fits_the_model(server: Server) -> None:
    bad, good = server.put(strength=0.5), server.put()
    assert server.state(bad) == "failed"
    assert server.job(bad).error == {
        "code": "invalid_request",
        "message": server.job(bad).error["message"],  # type: ignore[index]
    }
    assert "strength" in server.job(bad).error["message"]  # type: ignore[index]
    assert server.running() == [good]


def test_a_request_that_fails_on_all_ranks(server: Server) -> None:
    bad, good = server.put(), server.put()
    server.leave(bad, error="ValueError: height\nmust be\tdivisible")
    assert server.job(bad).error == {"code": "generation_failed", "message": "ValueError: height must be divisible"}
    server.complete(good)
    assert server.state(good) == "completed"


# Cancelling.


def test_cancel_while_queued(server: Server) -> None:
    ids = [server.put() for _ in range(3)]
    server.store.request_cancel(ids[2])
    server.jobs.wake()
    server.complete(ids[0])
    assert server.running() == [ids[1]]
    assert server.state(ids[2]) == "cancelled"
    assert server.cancels() == set()


def test_cancel_in_flight(server: Server) -> None:
    ids = [server.put() for _ in range(3)]
    key = server.key(ids[0])
    server.store.request_cancel(ids[0])
    for _ in range(3):
        server.jobs.wake()
    sent = [(rank, message) for rank, message in server.fleet.sent if isinstance(message, Cancel)]
    assert sent == [(0, Cancel(key)), (1, Cancel(key))]  # once for each rank
    assert server.state(ids[0]) == "in_progress"
    server.leave(ids[0], cancelled=True)
    assert server.state(ids[0]) == "cancelled"
    assert server.running() == ids[1:]
    assert (ids[0], "cancelled") in server.log.ends()


def test_cancel_as_the_ranks_die(server: Server) -> None:
    ids = [server.put(), server.put()]
    server.store.request_cancel(ids[0])
    server.die()
    assert [server.state(one) for one in ids] == ["cancelled", "in_progress"]
    assert server.log.ends() == [(ids[0], "cancelled")]


def test_cancel_while_the_result_is_written(server: Server) -> None:
    job_id = server.put()
    server.leave(job_id)
    server.store.request_cancel(job_id)
    server.jobs.wake()
    server.write()
    assert server.state(job_id) == "cancelled"
    assert list(server.store.files_of(job_id).iterdir()) == []
    assert server.log.ends() == [(job_id, "cancelled")]


@pytest.mark.parametrize("moment", ["queued", "in flight", "written", "dead"])
def test_deleted_at_any_moment(server: Server, moment: str) -> None:
    ids = [server.put() for _ in range(3)]
    job_id = ids[2] if moment == "queued" else ids[0]
    if moment == "written":
        server.leave(job_id)
    assert server.store.delete(job_id)
    server.jobs.wake()
    if moment == "in flight":
        server.leave(job_id, cancelled=True)
    elif moment == "dead":
        server.die()
    else:
        server.write()
    server.finish_all()
    assert server.store.get(job_id) is None
    assert not server.store.files_of(job_id).exists()
    assert all(server.state(one) == "completed" for one in ids if one != job_id)


def test_a_rank_that_answers_late_changes_nothing(server: Server) -> None:
    job_id = server.put()
    key = server.key(job_id)
    server.jobs.heard(0, Left(key, "sum"))
    server.die()
    server.jobs.heard(1, Left(key, "sum"))
    server.jobs.heard(0, Progress(key, 3, 4))
    assert server.key(job_id) != key
    assert server.jobs.running[server.key(job_id)].left == {}


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
    for module in (dispatch, running):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    assert server.jobs.overdue() is None
    first = server.put()
    now[0] += 599
    assert server.jobs.overdue() is None
    server.step(first)
    now[0] += 599
    assert server.jobs.overdue() is None
    now[0] += 2
    assert server.jobs.overdue() == "no sign of life for 601 s"
    server.complete(first)
    now[0] += 10_000  # idle ranks say nothing
    assert server.jobs.overdue() is None
    second = server.put()
    assert server.jobs.overdue() is None
    now[0] += 5 * 601 - 1  # the longest silence that was none, at this size
    assert server.jobs.overdue() is None
    now[0] += 2
    assert server.jobs.overdue() is not None
    server.die()
    assert server.running() == [second]
    assert server.jobs.overdue() is None


def test_a_rank_that_fails_alone_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: now[0])
    job_id = server.put()
    server.jobs.heard(1, Ended(server.key(job_id), "KeyError: 'x'"))
    now[0] += 601
    assert server.jobs.overdue() == "no sign of life for 601 s; rank 1 alone failed: KeyError: 'x'"


@pytest.mark.parametrize("server", [{"data_parallel_size": 2}], indirect=True)
def test_a_hang_of_one_replica_is_found(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: now[0])
    first, _ = server.put(), server.put()
    for _ in range(100):
        now[0] += 7
        server.step(first)
    assert server.jobs.overdue() is not None


# The store.


def test_a_full_disk_delays_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [server.put() for _ in range(3)]
    real = server.store.finish
    monkeypatch.setattr(server.store, "finish", broken)
    server.complete(ids[0])
    assert server.state(ids[0]) == "in_progress"
    server.jobs.write_again()
    assert server.running() == ids[1:]  # the ranks go on
    monkeypatch.setattr(server.store, "finish", real)
    server.jobs.write_again()
    assert server.state(ids[0]) == "completed"
    assert server.jobs._unwritten == []
    assert [event for event, _ in server.log.lines].count("store_failed") == 1


def test_a_store_that_fails_altogether_for_a_while(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [server.put() for _ in range(4)]
    with monkeypatch.context() as patch:
        for name in ("start", "finish", "put_back", "queued", "to_cancel", "get", "remember"):
            patch.setattr(server.store, name, broken)
        server.leave(ids[0])
        server.write()
        server.jobs.wake()
        server.jobs.down(Down("rank 0 has ended"))
        server.jobs.ready([INFO] * server.fleet.size)
        server.jobs.write_again()
        assert not server.jobs.running
    server.jobs.write_again()
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
    server.jobs.put_all_back()
    server.write()
    assert [server.state(one) for one in ids] == ["completed", "cancelled", "queued", "queued"]
    assert server.store.recover() == []


def test_nothing_begins_at_the_stop(server: Server) -> None:
    job_id = server.put()
    server.jobs.put_all_back()
    server.jobs.wake()  # the API process has something, while results are being written
    assert server.state(job_id) == "queued"
    assert server.running() == []


# Faults of our own.


def test_jobs_that_a_fault_lost_run_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [server.put() for _ in range(3)]
    real = server.jobs._write
    monkeypatch.setattr(server.jobs, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        server.leave(ids[0])
    assert server.state(ids[0]) == "in_progress"
    assert server.running() == ids[1:]
    server.jobs.find_lost()
    assert server.state(ids[0]) == "queued"
    monkeypatch.setattr(server.jobs, "_write", real)
    server.leave(ids[1])
    server.jobs.find_lost()  # its result is being written
    server.write()
    server.finish_all()
    assert {server.state(one) for one in ids} == {"completed"}


def test_a_fault_at_every_run_is_not_repeated_for_ever(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.jobs, "_write", lambda *_: 1 / 0)
    job_id = server.put()
    for _ in range(10):
        with contextlib.suppress(ZeroDivisionError, StopIteration):
            server.leave(job_id)
        server.jobs.find_lost()
        server.jobs.wake()
    assert server.state(job_id) == "failed"


def test_a_job_that_cannot_be_built_holds_up_nobody(server: Server) -> None:
    ids = [server.put(), server.put(width="x"), server.put()]
    assert server.state(ids[1]) == "failed"
    assert server.running() == [ids[0], ids[2]]


def test_the_loop_outlives_faults() -> None:
    told: list[Exception] = []
    loop = Loop(lambda: 1 / 0, every_s=0.01, on_trouble=told.append)  # type: ignore[arg-type, return-value]
    loop.call(lambda: {}["x"])  # type: ignore[arg-type]
    timer = threading.Timer(0.2, loop.call, (loop.stop,))
    timer.start()
    loop.run()
    assert {type(error) for error in told} == {KeyError, ZeroDivisionError}


def broken(*_: Any, **__: Any) -> Any:
    raise sqlite3.OperationalError("database or disk is full")
