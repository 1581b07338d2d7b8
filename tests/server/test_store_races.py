"""The store of jobs under several processes and kills, and in any order of changes, against a model of the valid
states."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from shardit.server.jobs.job import ENDED
from shardit.server.jobs.store import Store
from tests.support.stores import FORK, Clock, folders, put


def act_at_random(folder: Path, seed: int, ids: list[str], ready: Any) -> list[tuple[str, str]]:
    """Start, end, cancel and put back jobs, in any order; the ends and starts that were ours."""
    store, chance, ours = Store(folder), random.Random(seed), []
    ready.wait()
    for _ in range(150):
        job_id = chance.choice(ids)
        deed = chance.choice(("start", "finish", "cancel", "back", "delete"))
        if deed == "start" and store.start(job_id):
            ours.append((job_id, "start"))
        elif deed == "back" and store.requeue(job_id):
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
    """A process that accepts and ends jobs is killed; acknowledged jobs are there and complete."""
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
    """Two connections, as of two processes, against a model of the valid states."""

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
    def requeue(self, job_id: str, which: int) -> None:
        possible = self.states.get(job_id) == "in_progress" and job_id not in self.wanted
        assert self.stores[which].requeue(job_id) == possible
        if possible:
            self.states[job_id] = "queued"

    @rule(job_id=ids, which=st.integers(0, 1), end=st.sampled_from(ENDED))
    def finish(self, job_id: str, which: int, end: Any) -> None:
        possible = self.states.get(job_id) in ("queued", "in_progress")
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


def test_recover_during_accepts_of_other_processes(tmp_path: Path) -> None:
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
