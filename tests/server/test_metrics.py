"""Counters of the supervisor, and their reset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from shardit.server.entry.serve import listening
from shardit.server.jobs.job import NewJob
from shardit.server.jobs.store import Store
from shardit.server.messages import Measured, Scrape
from shardit.server.options import ServeOptions
from shardit.server.supervisor.supervisor import RETAIN_AT_MOST, Supervisor


class Nowhere:
    """Ranks that are never started."""

    def start(self, spec: Any) -> Any:
        raise AssertionError

    kill = stop = stacks = start


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def put(store: Store) -> str:
    return store.accept(NewJob("image", {"prompt": "a cat"}, 1, 1.0), queue_size=100)[0].id


def test_old_jobs_are_forgotten_by_and_by(store: Store, tmp_path: Path) -> None:
    jobs = [put(store) for _ in range(RETAIN_AT_MOST + 5)]
    waiting = put(store)
    for job_id in jobs:
        store.finish(job_id, "failed")
    with listening("127.0.0.1", 0) as listener:
        options = ServeOptions("tiny/flux", tmp_path, port=0, keep_days=-1.0)
        supervisor = Supervisor(options, cast(Any, None), listener, Nowhere())
        supervisor.api.check = lambda: None  # type: ignore[method-assign]
        supervisor.tick()
        assert store.counts() == {"failed": 5, "queued": 1}
        supervisor.tick()
        supervisor.tick()
        assert store.counts() == {"queued": 1}
        assert [path.name for path in (tmp_path / "jobs").iterdir()] == [waiting]
        supervisor.writers.shutdown()
        supervisor.store.close()


def test_jobs_cancelled_while_they_wait_are_counted(store: Store, tmp_path: Path) -> None:
    """By the API process, which reports nothing; also if they are deleted with it, but not those of earlier runs."""
    store.request_cancel(put(store))
    with listening("127.0.0.1", 0) as listener:
        supervisor = Supervisor(ServeOptions("tiny/flux", tmp_path, port=0), cast(Any, None), listener, Nowhere())
        told: list[Any] = []
        supervisor.api.send = told.append  # type: ignore[method-assign]

        def cancelled() -> float:
            supervisor.on_api_message(Scrape())
            text = next(one.text for one in reversed(told) if isinstance(one, Measured)).decode()
            found = [line for line in text.splitlines() if line.startswith('shardit_jobs_total{state="cancelled"}')]
            return float(found[0].split()[-1]) if found else 0.0

        assert cancelled() == 0
        waiting, deleted, running, lost = (put(store) for _ in range(4))
        store.request_cancel(waiting)
        store.request_cancel(waiting)
        assert cancelled() == 1
        store.delete(deleted)
        store.start(running)
        store.request_cancel(running)  # which the dispatcher counts when the ranks have let go
        assert cancelled() == 2
        supervisor.jobs.finisher.end(supervisor.store.in_progress()[0], "cancelled")
        assert cancelled() == 3
        store.start(lost)
        store.request_cancel(lost)
        supervisor.store.recover()
        assert cancelled() == cancelled() == 4
        supervisor.writers.shutdown()
        supervisor.store.close()
