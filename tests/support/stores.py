"""Jobs for tests of the store, and the values to compare."""

from __future__ import annotations

import multiprocessing
from typing import Any

from shardit.server.jobs.job import Job, NewJob
from shardit.server.jobs.store import Store

FORK = multiprocessing.get_context("fork")


class Clock:
    def __init__(self, now: float = 1e9):
        self.now = now

    def __call__(self) -> float:
        return self.now


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


def order(store: Store) -> list[str]:
    return [one.id for one in store.queued(1000)]


def finished(store: Store, size: int) -> str:
    job_id = put(store)
    store.start(job_id)
    (store.files_of(job_id) / "output.png").write_bytes(b"x" * size)
    assert store.finish(job_id, "completed", files=["output.png"])
    return job_id
