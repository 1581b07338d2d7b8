"""The store of jobs: one end for each, whoever changes it at the same time, and whatever disk and clock do."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from shardit.errors import InputError
from shardit.server import migrations
from shardit.server.jobs import ENDED, OPEN, PRIORITY_S, Job, NewJob
from shardit.server.store import Conflict, QueueFull, Store

FORK = multiprocessing.get_context("fork")


class Clock:
    def __init__(self, now: float = 1e9):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Any:
    store = Store(tmp_path / "data", clock)
    yield store
    store.close()


def new(cost: float = 1.0, **more: Any) -> NewJob:
    return NewJob("image", {"prompt": "a cat"}, seed=7, cost=cost, **more)


def put(store: Store, cost: float = 1.0, **more: Any) -> str:
    return store.accept(new(cost, **more), queue_size=1000)[0].id


def job(store: Store, job_id: str) -> Job:
    found = store.get(job_id)
    assert found is not None
    return found


def folders(store: Store) -> set[str]:
    return {path.name for path in (store.folder / "jobs").iterdir()}


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` gives in a forked process, whose limits and user it may change. It must not use our connection."""
    ours, theirs = FORK.Pipe()

    def run() -> None:
        try:
            theirs.send(work())
        except BaseException as error:
            theirs.send(error)

    process = FORK.Process(target=run)
    process.start()
    theirs.close()
    try:
        assert ours.poll(60), "the child says nothing"
        answer = ours.recv()
    finally:
        process.join(10)
        process.kill()
    if isinstance(answer, BaseException):
        raise answer
    return answer


# One end.


def test_a_job_keeps_what_it_was_given(store: Store) -> None:
    given = new(inputs={"0.png": b"abc"}, view={"size": "64x64"}, owner="me", waits=True)
    accepted, is_new = store.accept(given, queue_size=1)
    assert is_new
    assert accepted == job(store, accepted.id)
    assert (accepted.request, accepted.seed, accepted.view) == ({"prompt": "a cat"}, 7, {"size": "64x64"})
    assert (accepted.owner, accepted.waits, accepted.inputs, accepted.bytes) == ("me", True, ("0.png",), 3)
    assert (store.files_of(accepted.id) / "0.png").read_bytes() == b"abc"
    assert accepted.state == "queued"
    assert not accepted.ended


@pytest.mark.parametrize("end", ENDED)
@pytest.mark.parametrize("begun", [True, False])
def test_exactly_one_end(store: Store, end: Any, begun: bool) -> None:
    job_id = put(store)
    assert not begun or store.start(job_id)
    assert store.finish(job_id, end)
    ended = job(store, job_id)
    for other in ENDED:
        assert not store.finish(job_id, other, error={"code": "late"})
    store.request_cancel(job_id)
    assert not store.start(job_id)
    assert not store.put_back(job_id)
    assert store.recover() == []
    assert job(store, job_id) == ended


def test_start_takes_a_job_once(store: Store) -> None:
    job_id = put(store)
    assert store.start(job_id)
    assert not store.start(job_id)
    assert job(store, job_id).attempts == 1
    assert store.put_back(job_id)
    assert not store.put_back(job_id)
    assert store.start(job_id)
    assert job(store, job_id).attempts == 2


def test_a_cancelled_job_is_not_put_back(store: Store) -> None:
    job_id = put(store)
    store.start(job_id)
    store.request_cancel(job_id)
    assert store.to_cancel() == [job_id]
    assert not store.put_back(job_id)
    assert store.finish(job_id, "cancelled")


def test_deaths_are_counted(store: Store) -> None:
    job_id = put(store)
    for died, alone in ((False, False), (True, False), (True, True), (False, True)):
        store.start(job_id)
        store.put_back(job_id, died=died, alone=alone)
    assert (job(store, job_id).deaths, job(store, job_id).deaths_alone) == (2, 1)


def act_at_random(folder: Path, seed: int, ids: list[str], ready: Any) -> list[tuple[str, str]]:
    """Start, end, cancel and put back jobs, in any order; the ends and starts that were ours."""
    store, chance, ours = Store(folder), random.Random(seed), []
    ready.wait()
    for _ in range(150):
        job_id = chance.choice(ids)
        deed = chance.choice(("start", "finish", "cancel", "back", "delete"))
        if deed == "start" and store.start(job_id):
            ours.append((job_id, "start"))
        elif deed == "back" and store.put_back(job_id):
            ours.append((job_id, "back"))
        elif deed == "cancel":
            store.request_cancel(job_id)
        elif deed == "delete" and chance.random() < 0.1:
            store.delete(job_id)
        elif deed == "finish" and store.finish(job_id, chance.choice(("completed", "failed"))):
            ours.append((job_id, "end"))
    return ours


def test_two_processes_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ids = [put(store) for _ in range(12)]
    store.close()
    ready = FORK.Barrier(2)
    results: Any = FORK.Queue()
    processes = [
        FORK.Process(target=lambda seed=seed: results.put(act_at_random(tmp_path, seed, ids, ready))) for seed in (1, 2)
    ]
    for process in processes:
        process.start()
    done = [entry for _ in processes for entry in results.get(timeout=60)]
    for process in processes:
        process.join(10)
    store = Store(tmp_path)
    for job_id in ids:
        deeds = [deed for other, deed in done if other == job_id]
        assert deeds.count("end") <= 1
        assert 0 <= deeds.count("start") - deeds.count("back") <= 1
        found = store.get(job_id)
        assert found is None or not deeds.count("end") or found.ended
    store.recover()
    assert all(one.state == "queued" for one in store.queued())
    assert folders(store) == {one.id for one in map(store.get, ids) if one is not None}
    store.close()


def test_an_accepted_job_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    """A process that accepts and ends jobs is killed; what it has told is there, and what is there is whole."""
    chance = random.Random(3)
    told: set[str] = set()
    for _ in range(4):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            store = Store(tmp_path)
            while True:
                job_id = put(store, inputs={"0.png": b"x" * 5000})
                store.start(job_id)
                os.write(writing, job_id.encode() + b"\n")
        os.close(writing)
        with os.fdopen(reading) as lines:
            told.add(lines.readline().strip())
            threading.Timer(chance.uniform(0, 0.1), os.kill, (pid, signal.SIGKILL)).start()
            told.update(line.strip() for line in lines if line.endswith("\n"))
        os.waitpid(pid, 0)
    store = Store(tmp_path)
    again = {one.id for one in store.recover()}
    assert told <= {one.id for one in store.queued(10**6)}
    assert again <= {one.id for one in store.queued(10**6)}
    assert folders(store) == {one.id for one in store.queued(10**6)}
    assert all((store.files_of(job_id) / "0.png").stat().st_size == 5000 for job_id in told)
    store.close()


class Jobs(RuleBasedStateMachine):
    """Two connections, as of two processes, against a model of what must be."""

    ids = Bundle("ids")

    @initialize()
    def open(self) -> None:
        self.clock = Clock()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.stores = [Store(self.folder, self.clock) for _ in range(2)]
        self.states: dict[str, str] = {}
        self.wanted: set[str] = set()

    @rule(target=ids, which=st.integers(0, 1), cost=st.floats(0, 1e4), back=st.floats(-1e4, 1e4))
    def accept(self, which: int, cost: float, back: float) -> str:
        self.clock.now += back
        job_id = put(self.stores[which], cost)
        self.states[job_id] = "queued"
        return job_id

    @rule(job_id=ids, which=st.integers(0, 1))
    def start(self, job_id: str, which: int) -> None:
        assert self.stores[which].start(job_id) == (self.states.get(job_id) == "queued")
        if self.states.get(job_id) == "queued":
            self.states[job_id] = "in_progress"

    @rule(job_id=ids, which=st.integers(0, 1))
    def put_back(self, job_id: str, which: int) -> None:
        possible = self.states.get(job_id) == "in_progress" and job_id not in self.wanted
        assert self.stores[which].put_back(job_id) == possible
        if possible:
            self.states[job_id] = "queued"

    @rule(job_id=ids, which=st.integers(0, 1), end=st.sampled_from(ENDED))
    def finish(self, job_id: str, which: int, end: Any) -> None:
        possible = self.states.get(job_id) in OPEN
        assert self.stores[which].finish(job_id, end) == possible
        if possible:
            self.states[job_id] = end
        self.wanted.discard(job_id)

    @rule(job_id=ids, which=st.integers(0, 1))
    def cancel(self, job_id: str, which: int) -> None:
        self.stores[which].request_cancel(job_id)
        if self.states.get(job_id) == "queued":
            self.states[job_id] = "cancelled"
        elif self.states.get(job_id) == "in_progress":
            self.wanted.add(job_id)

    @rule(job_id=consumes(ids), which=st.integers(0, 1))
    def delete(self, job_id: str, which: int) -> None:
        assert self.stores[which].delete(job_id) == (job_id in self.states)
        assert self.stores[1 - which].get(job_id) is None
        if self.states.get(job_id) == "in_progress":
            assert self.stores[which].finish(job_id, "completed")
        self.states.pop(job_id, None)
        self.wanted.discard(job_id)
        assert not self.stores[which].files_of(job_id).exists()

    @rule(target=ids)
    def restart(self) -> Any:
        self.stores[0].close()
        self.stores[0] = Store(self.folder, self.clock)
        again = {one.id for one in self.stores[0].recover()}
        running = {job_id for job_id, state in self.states.items() if state == "in_progress"}
        assert again == running - self.wanted
        self.states.update({job_id: "cancelled" if job_id in self.wanted else "queued" for job_id in running})
        self.wanted.clear()
        return multiple()

    @invariant()
    def as_it_must_be(self) -> None:
        for store in getattr(self, "stores", ()):
            found = {job_id: store.get(job_id) for job_id in self.states}
            assert {job_id: one and one.state for job_id, one in found.items()} == self.states
            queued = store.queued(10**6)
            assert {one.id for one in queued} == {job_id for job_id, s in self.states.items() if s == "queued"}
            assert [store.position(one) for one in queued] == list(range(len(queued)))
            assert folders(store) == set(self.states)

    def teardown(self) -> None:
        for store in getattr(self, "stores", ()):
            store.close()
        self.temporary.cleanup()


TestAnyOrder = Jobs.TestCase
TestAnyOrder.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


# Idempotency.


def test_a_repeated_key_gives_the_same_job(store: Store) -> None:
    first, is_new = store.accept(new(idempotency_key="k", fingerprint="f", owner="a"), queue_size=1)
    assert is_new
    again, is_new = store.accept(new(idempotency_key="k", fingerprint="f", owner="a"), queue_size=1)  # though full
    assert (again, is_new) == (first, False)
    with pytest.raises(Conflict, match="used for another request"):
        store.accept(new(idempotency_key="k", fingerprint="other", owner="a"), queue_size=9)
    other, is_new = store.accept(new(idempotency_key="k", fingerprint="f", owner="b"), queue_size=9)
    assert is_new
    assert other.id != first.id
    nobodys = [store.accept(new(idempotency_key="k", fingerprint="f"), queue_size=9)[0].id for _ in range(2)]
    assert len({*nobodys, first.id, other.id}) == 3
    assert folders(store) == {*nobodys, first.id, other.id}


def test_a_deleted_job_frees_its_key(store: Store) -> None:
    first, _ = store.accept(new(idempotency_key="k"), queue_size=9)
    store.start(first.id)
    store.delete(first.id)
    second, is_new = store.accept(new(idempotency_key="k"), queue_size=9)
    assert is_new
    assert job(store, second.id).state == "queued"


def test_one_key_from_many_threads_makes_one_job(store: Store) -> None:
    others = [Store(store.folder) for _ in range(4)]
    barrier = threading.Barrier(len(others))
    seen: list[tuple[Job, bool]] = []

    def accept(one: Store) -> None:
        barrier.wait()
        given = new(idempotency_key="k", inputs={"0.png": b"1"})
        seen.extend(one.accept(given, queue_size=9) for _ in range(5))

    threads = [threading.Thread(target=accept, args=(one,)) for one in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 20
    assert len({one.id for one, _ in seen}) == 1
    assert sum(is_new for _, is_new in seen) == 1
    assert len(folders(store)) == 1


# The queue.


def order(store: Store) -> list[str]:
    return [one.id for one in store.queued(1000)]


def test_short_before_long_but_nothing_starves(store: Store, clock: Clock) -> None:
    long = put(store, cost=300)
    clock.now += 1
    short = put(store, cost=2)
    assert order(store) == [short, long]
    clock.now += 400
    late = put(store, cost=2)
    assert order(store) == [short, long, late]


def test_equal_jobs_go_in_order(store: Store, clock: Clock) -> None:
    ids = [put(store) for _ in range(20)]
    assert order(store) == ids
    store.start(ids[3])
    store.put_back(ids[3])
    assert order(store) == ids


def test_priority_is_waiting_time(store: Store, clock: Clock) -> None:
    plain = put(store)
    urgent = put(store, priority=1)
    patient = put(store, priority=-1)
    assert order(store) == [urgent, plain, patient]
    clock.now += PRIORITY_S + 1
    late = put(store, priority=1)
    assert order(store)[:3] == [urgent, plain, late]


def test_nothing_starves_while_the_clock_is_behind(store: Store, clock: Clock) -> None:
    long = put(store, cost=300)
    clock.now -= 3600  # daylight saving by hand
    for _ in range(50):
        short = put(store, cost=2)
        clock.now += 10
        store.start(order(store)[0])
    assert job(store, long).state == "in_progress"
    assert job(store, short).created_at < 1e9


def test_order_survives_clocks_that_jump(store: Store, clock: Clock) -> None:
    chance, ids = random.Random(5), []
    for _ in range(100):
        clock.now += chance.choice((1, 1000, -1000))
        ids.append(put(store))
    before = order(store)
    assert sorted(before) == sorted(ids)
    assert order(store) == before
    times = [one.created_at for one in store.queued(1000)]
    assert times == sorted(times)
    running = before[0]
    store.start(running)
    clock.now -= 10**6
    assert store.finish(running, "completed")
    assert job(store, running).finished_at >= job(store, running).created_at  # type: ignore[operator]


def test_a_full_queue_and_a_greedy_owner(store: Store) -> None:
    ids = [store.accept(new(owner="a"), queue_size=3, of_owner=2)[0].id for _ in range(2)]
    with pytest.raises(QueueFull, match="2 jobs open") as caught:
        store.accept(new(owner="a"), queue_size=3, of_owner=2)
    assert 1 <= caught.value.retry_after_s <= 60
    store.accept(new(owner="b"), queue_size=3, of_owner=2)
    with pytest.raises(QueueFull, match="the queue is full"):
        store.accept(new(owner="c", inputs={"0.png": b"1"}), queue_size=3)
    assert len(folders(store)) == 3
    store.start(ids[0])
    store.accept(new(owner="c"), queue_size=3)


def test_positions_and_pages(store: Store) -> None:
    ids = [put(store, owner="a") for _ in range(5)]
    put(store, owner="b")
    assert [store.position(job(store, job_id)) for job_id in ids] == [0, 1, 2, 3, 4]
    page, more = store.page("image", owner="a", limit=3)
    assert ([one.id for one in page], more) == (ids[:1:-1], True)
    page, more = store.page("image", owner="a", limit=3, after=ids[2])
    assert ([one.id for one in page], more) == (ids[1::-1], False)
    page, more = store.page("image", owner="a", limit=3, after=ids[1], order="asc")
    assert ([one.id for one in page], more) == (ids[2:], False)
    with pytest.raises(InputError, match="there is no job"):
        store.page("image", owner="b", after=ids[0])
    assert store.page("video", owner="a") == ([], False)


# What is forgotten, and what comes back.


def finished(store: Store, size: int) -> str:
    job_id = put(store)
    store.start(job_id)
    (store.files_of(job_id) / "output.png").write_bytes(b"x" * size)
    assert store.finish(job_id, "completed", files=["output.png"])
    return job_id


def test_retention_by_age(store: Store, clock: Clock) -> None:
    old = finished(store, 10)
    clock.now += 50
    waiting, young = put(store), finished(store, 10)
    clock.now += 60
    assert store.retain(100, 10**9) == [old]
    assert folders(store) == {waiting, young}
    clock.now -= 10**6  # a clock set back makes nothing older
    assert store.retain(100, 10**9) == []


def test_retention_by_size_takes_the_oldest_and_no_open_job(store: Store) -> None:
    waiting = put(store, inputs={"0.png": b"x" * 100})
    ids = [finished(store, 100) for _ in range(5)]
    assert store.retain(1e9, 350) == ids[:3]
    assert store.retain(1e9, 0) == ids[3:]
    assert folders(store) == {waiting}
    assert store.counts() == {"queued": 1}


def test_a_deleted_job_in_progress_goes_with_its_end(store: Store) -> None:
    job_id = put(store)
    store.start(job_id)
    assert store.delete(job_id)
    assert store.get(job_id) is None
    assert not store.delete(job_id)
    assert store.to_cancel() == [job_id]
    (store.files_of(job_id) / "output.png").write_bytes(b"x")
    assert store.finish(job_id, "completed", files=["output.png"])
    assert folders(store) == set()
    assert store.counts() == {}


def test_recover(store: Store) -> None:
    queued, running, cancelled, deleted, done = put(store), put(store), put(store), put(store), finished(store, 10)
    for job_id in (running, cancelled, deleted):
        store.start(job_id)
    store.request_cancel(cancelled)
    store.delete(deleted)
    (store.folder / "jobs" / "image_of_nobody").mkdir()
    (store.folder / "jobs" / "image_of_nobody" / "0.png").write_bytes(b"1")
    assert [one.id for one in store.recover()] == [running]
    assert order(store) == [queued, running]
    assert job(store, cancelled).state == "cancelled"
    assert store.get(deleted) is None
    assert folders(store) == {queued, running, cancelled, done}


@pytest.mark.parametrize("inputs", [{}, {"0.png": b"x" * 100}])
def test_recover_while_a_job_is_accepted(
    store: Store, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, bytes]
) -> None:
    """By a process of a server that was killed: the job has its files, or its client is told that it was not taken."""
    other = Store(store.folder)
    write = store._write_inputs
    monkeypatch.setattr(store, "_write_inputs", lambda *given: (write(*given), other.recover()))
    with pytest.raises(FileNotFoundError, match="send it again"):
        store.accept(new(inputs=inputs), queue_size=9)
    assert (order(store), folders(store)) == ([], set())
    other.close()


def test_recover_beside_processes_that_accept(tmp_path: Path) -> None:
    """As it happens, many times: an accepted job always has its files."""

    def accept(count: int = 60) -> None:
        store = Store(tmp_path)
        for _ in range(count):
            with contextlib.suppress(FileNotFoundError):
                put(store, inputs={"0.png": b"x" * 100})
        store.close()

    processes = [FORK.Process(target=accept) for _ in range(2)]
    store = Store(tmp_path)
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        store.recover()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    accepted = store.queued(1000)
    assert all((store.files_of(one.id) / "0.png").is_file() for one in accepted)
    assert folders(store) == {one.id for one in accepted}
    store.close()


def test_jobs_whose_client_has_gone(store: Store) -> None:
    waits, running, stays = put(store, waits=True), put(store, waits=True), put(store)
    store.start(running)
    ended = put(store, waits=True)
    store.start(ended)
    store.finish(ended, "completed")
    assert set(store.drop_waiting()) == {waits, running}
    assert job(store, waits).state == "cancelled"
    assert store.to_cancel() == [running]
    assert job(store, ended).state == "completed"
    assert job(store, stays).state == "queued"


def test_facts_outlive_a_process(store: Store) -> None:
    store.remember("speed", {"64x64": 0.5})
    store.remember("speed", {"64x64": 0.25})
    other = Store(store.folder)
    assert other.recall("speed") == {"64x64": 0.25}
    assert other.recall("nothing", 3) == 3
    other.close()


# Older and newer stores.

VERSION_1 = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, state TEXT NOT NULL,
    request TEXT NOT NULL, seed INTEGER NOT NULL, view TEXT NOT NULL, created_at REAL NOT NULL, due REAL NOT NULL,
    owner TEXT, waits INTEGER NOT NULL DEFAULT 0, inputs TEXT NOT NULL DEFAULT '[]', started_at REAL, finished_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0, cancel_requested INTEGER NOT NULL DEFAULT 0,
    doomed INTEGER NOT NULL DEFAULT 0, error TEXT, files TEXT NOT NULL DEFAULT '[]', facts TEXT NOT NULL DEFAULT '{}',
    bytes INTEGER NOT NULL DEFAULT 0, idempotency_key TEXT, fingerprint TEXT NOT NULL DEFAULT ''
);
CREATE INDEX jobs_by_state ON jobs (state, due, number);
CREATE UNIQUE INDEX jobs_by_key ON jobs (ifnull(owner, ''), idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO jobs (id, kind, state, request, seed, view, created_at, due, idempotency_key, fingerprint, attempts)
    VALUES ('video_1', 'video', 'in_progress', '{"prompt": "a cat"}', 3, '{}', 5.0, 6.0, 'k', 'f', 2);
INSERT INTO jobs (id, kind, state, request, seed, view, created_at, due, files, bytes)
    VALUES ('image_2', 'image', 'completed', '{"prompt": "a dog"}', 4, '{"n": 1}', 7.0, 8.0, '["output.png"]', 9);
INSERT INTO facts VALUES ('speed', '0.5');
PRAGMA user_version = 1;
"""


def of_version_1(folder: Path) -> None:
    (folder / "jobs" / "video_1").mkdir(parents=True)
    with sqlite3.connect(folder / "jobs.sqlite") as db:
        db.executescript(VERSION_1)
    db.close()


def version(folder: Path) -> int:
    db = sqlite3.connect(folder / "jobs.sqlite")
    try:
        return db.execute("PRAGMA user_version").fetchone()[0]
    finally:
        db.close()


def test_a_store_of_version_1_goes_on(tmp_path: Path) -> None:
    of_version_1(tmp_path)
    store = Store(tmp_path)
    (again,) = store.recover()
    assert (again.id, again.seed, again.attempts, again.deaths) == ("video_1", 3, 2, 0)
    assert order(store) == ["video_1"]
    assert job(store, "image_2").files == ("output.png",)
    assert store.recall("speed") == 0.5
    same, is_new = store.accept(new(idempotency_key="k", fingerprint="f"), queue_size=1)
    assert (same.id, is_new) == ("video_1", False)
    later = put(store)
    assert job(store, later).number > job(store, "image_2").number
    store.close()
    assert version(tmp_path) == len(migrations.STEPS)


def test_a_further_step_reaches_a_store_with_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    before = job(store, put(store))
    store.close()
    step = "ALTER TABLE jobs ADD COLUMN note TEXT NOT NULL DEFAULT 'none'; CREATE TABLE more (x)"
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, step))
    store = Store(tmp_path)
    assert job(store, before.id) == before
    assert store._all("SELECT note FROM jobs", ())[0][0] == "none"
    store.close()
    assert version(tmp_path) == len(migrations.STEPS)


def test_a_step_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_version_1(tmp_path)
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, "CREATE TABLE more (x); SELECT nonsense"))
    with pytest.raises(InputError, match="nonsense"):
        Store(tmp_path)
    assert version(tmp_path) == 1
    monkeypatch.undo()
    store = Store(tmp_path)
    assert order(store) == []
    assert len(store.recover()) == 1
    store.close()


def test_a_newer_store_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InputError, match="newer shardit") as caught:
        Store(tmp_path)
    assert "\n" not in str(caught.value)
    assert version(tmp_path) == 99


def test_many_processes_make_one_store(tmp_path: Path) -> None:
    def open_and_put() -> None:
        store = Store(tmp_path)
        put(store)
        store.close()

    processes = [FORK.Process(target=open_and_put) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    store = Store(tmp_path)
    assert len(order(store)) == 6
    store.close()


# Disks.


def full(store: Store) -> Callable[[], None]:
    """Let the database not grow; returns what ends that."""
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    return lambda: store._db.execute("PRAGMA max_page_count=1000000") and None


def test_a_full_disk_loses_nothing(store: Store) -> None:
    running = put(store)
    store.start(running)
    let_go = full(store)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.accept(new(fingerprint="x" * 10**5), queue_size=10**6)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.finish(running, "failed", error={"message": "x" * 10**5})
    assert job(store, running).state == "in_progress"
    assert folders(store) == {running, *order(store)}
    let_go()
    assert store.finish(running, "failed", error={"message": "x" * 10**5})
    other = Store(store.folder)
    assert job(other, running).state == "failed"  # it was committed
    other.close()


def test_a_commit_that_fails_is_no_commit(store: Store) -> None:
    """After a failed COMMIT the next change stands on its own."""
    job_id = put(store)
    store._db.execute("CREATE TABLE parents (x PRIMARY KEY)")
    store._db.execute("CREATE TABLE children (x REFERENCES parents DEFERRABLE INITIALLY DEFERRED)")
    store._db.execute("PRAGMA foreign_keys=ON")
    with pytest.raises(sqlite3.IntegrityError):
        store._update("INSERT INTO children VALUES (?)", (1,))
    assert store.start(job_id)
    other = Store(store.folder)
    assert job(other, job_id).state == "in_progress"
    other.close()


def test_a_disk_without_room_for_a_file(tmp_path: Path) -> None:
    """Of the whole process, as a quota would: neither half a picture nor half a job is left."""
    folder = tmp_path / "data"
    Store(folder).close()

    def accept() -> Any:
        store = Store(folder)
        kept = put(store, inputs={"0.png": b"x" * 100})
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            store.accept(new(inputs={"0.png": b"x" * 10**6}), queue_size=9)
        except OSError as error:
            return kept, error.errno, folders(store), order(store)
        return "it was accepted"

    kept, _, left, queue = in_child(accept)
    assert (left, queue) == ({kept}, [kept])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another with --data-dir") as caught:
        Store(tmp_path / "file" / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_folders_that_are_read_only(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    store = Store(folder)
    put(store)
    store.close()
    for path in (folder / "jobs").iterdir():
        path.chmod(0o555)
    for path in (folder / "jobs", folder):
        path.chmod(0o555)

    def as_nobody() -> str:
        os.setuid(65534)
        try:
            Store(folder)
        except InputError as error:
            return str(error)
        return "it was opened"

    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(0o755)
    text = in_child(as_nobody)
    assert "cannot be used" in text
    assert "--data-dir" in text
    assert "\n" not in text


def test_no_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_text("no database, but a text that is long enough to be taken for one" * 50)
    with pytest.raises(InputError, match="not a database"):
        Store(tmp_path)


def test_json_of_any_text(store: Store) -> None:
    text = "ümläut \x00 \U0001f600 '\"; DROP TABLE jobs"
    accepted, _ = store.accept(NewJob("image", {"prompt": text}, 2**63 - 1, 1.0, owner=text), queue_size=9)
    found = job(store, accepted.id)
    assert json.loads(json.dumps(found.request)) == {"prompt": text}
    assert (found.seed, found.owner) == (2**63 - 1, text)
