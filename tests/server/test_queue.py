"""The queue in the store: order under clock changes, refusals, and deletion of old jobs."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardit.errors import InputError
from shardit.server.jobs.admission import Conflict, QueueFull
from shardit.server.jobs.job import PRIORITY_S, Job
from shardit.server.jobs.store import Store
from tests.support.stores import Clock, finished, folders, job, new, order, put


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    store = Store(tmp_path / "data", clock)
    yield store
    store.close()


# The queue.


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
    store.requeue(ids[3])
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


# What is forgotten.


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


def test_retention_takes_a_few_at_a_time(store: Store) -> None:
    """The supervisor's loop has other things to do."""
    ids = [finished(store, 10) for _ in range(5)]
    assert store.retain(1e9, 0, 2) == ids[:2]
    assert store.counts() == {"completed": 3}
    assert store.retain(1e9, 10, 2) == ids[2:4]
    assert store.retain(1e9, 10, 2) == []
