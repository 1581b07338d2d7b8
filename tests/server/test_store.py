"""The store of jobs: one end for each under concurrent changes, and recovery after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardit.diffusion.request.model_info import ModelInfo
from shardit.server.http.state import model_info
from shardit.server.jobs import admission
from shardit.server.jobs import store as stores
from shardit.server.jobs.job import ENDED, NewJob
from shardit.server.jobs.store import Store
from tests.diffusion.test_returned import CALLED
from tests.support.stores import finished, folders, job, new, order, put


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "data")
    yield store
    store.close()


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


def test_acknowledged_jobs_are_on_the_disk(store: Store) -> None:
    for name, value in (("journal_mode", "wal"), ("synchronous", 2)):
        assert store._db.all(f"PRAGMA {name}")[0][0] == value, name


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
    assert not store.requeue(job_id)
    assert store.recover() == []
    assert job(store, job_id) == ended


def test_start_takes_a_job_once(store: Store) -> None:
    job_id = put(store)
    assert store.start(job_id)
    assert not store.start(job_id)
    assert job(store, job_id).attempts == 1
    assert store.requeue(job_id)
    assert not store.requeue(job_id)
    assert store.start(job_id)
    assert job(store, job_id).attempts == 2


def test_a_cancelled_job_is_not_put_back(store: Store) -> None:
    job_id = put(store)
    store.start(job_id)
    store.request_cancel(job_id)
    assert store.to_cancel() == [job_id]
    assert not store.requeue(job_id)
    assert store.finish(job_id, "cancelled")


def test_deaths_are_counted(store: Store) -> None:
    job_id = put(store)
    for died, alone in ((False, False), (True, False), (True, True), (False, True)):
        store.start(job_id)
        store.requeue(job_id, died=died, alone=alone)
    assert (job(store, job_id).deaths, job(store, job_id).deaths_alone) == (2, 1)


# What comes back.


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
    lost = f"image_{'0' * 32}"
    for name in (lost, "image_of_mine"):
        (store.folder / "jobs" / name).mkdir()
        (store.folder / "jobs" / name / "0.png").write_bytes(b"1")
    assert [one.id for one in store.recover()] == [running]
    assert order(store) == [queued, running]
    assert job(store, cancelled).state == "cancelled"
    assert store.get(deleted) is None
    assert folders(store) == {queued, running, cancelled, done, "image_of_mine"}


@pytest.mark.parametrize("inputs", [{}, {"0.png": b"x" * 100}])
def test_recover_while_a_job_is_accepted(
    store: Store, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, bytes]
) -> None:
    """By a process of a killed server: the job has its files, or its client gets an error."""
    other = Store(store.folder)
    write = admission.write_inputs
    monkeypatch.setattr(stores, "write_inputs", lambda *given: (write(*given), other.recover()))
    with pytest.raises(FileNotFoundError, match="send it again"):
        store.accept(new(inputs=inputs), queue_size=9)
    assert (order(store), folders(store)) == ([], set())
    other.close()


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


def test_json_of_any_text(store: Store) -> None:
    text = "ümläut \x00 \U0001f600 '\"; DROP TABLE jobs"
    accepted, _ = store.accept(NewJob("image", {"prompt": text}, 2**63 - 1, 1.0, owner=text), queue_size=9)
    found = job(store, accepted.id)
    assert json.loads(json.dumps(found.request)) == {"prompt": text}
    assert (found.seed, found.owner) == (2**63 - 1, text)


def test_facts_about_every_pipeline_return_as_they_were(store: Store) -> None:
    for name, takes in CALLED.items():
        info = ModelInfo(takes, takes, notes=("a note",))
        model_info.remember(store, name, info)
        assert model_info.recall(store, name) == info, name
    assert model_info.recall(store, "another") is None
