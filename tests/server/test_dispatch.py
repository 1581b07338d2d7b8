"""Decisions of the dispatcher with ranks played by the test: slots, input pictures, cancelling."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardit.diffusion.request.model_info import ModelInfo
from shardit.engine.process.failure import Failure
from shardit.engine.process.messages import Begin, Cancel, Progress, RequestFinished
from shardit.server.estimate import work_of
from shardit.server.messages import Changed, StepDone
from shardit.server.supervisor import prefetch as prefetcher
from tests.support.http_fake import picture
from tests.support.played import INFO, SIGNATURE, Server, played_server


@pytest.fixture
def server(tmp_path: Path, request: Any) -> Iterator[Server]:
    with played_server(tmp_path, **getattr(request, "param", {"pipeline_parallel_size": 2})) as made:
        yield made


# Slots.


def test_slots_are_filled_in_order(server: Server) -> None:
    ids = [server.put() for _ in range(4)]
    assert server.running() == ids[:2]
    assert [server.state(one) for one in ids] == ["in_progress"] * 2 + ["queued"] * 2
    begins = [(rank, message.key) for rank, message in server.rank_group.sent if isinstance(message, Begin)]
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


def test_the_next_job_is_sent_while_one_leaves(server: Server) -> None:
    ids = [server.put() for _ in range(5)]
    server.step(ids[0], 3, 4)
    assert server.running() == ids[:2]
    server.step(ids[0], 4, 4)  # it is decoded now
    assert server.running() == ids[:3]
    assert server.jobs.in_flight == 2
    sent = server.jobs.running[server.key(ids[2])]
    assert sent.ahead
    before = sent.begun
    server.complete(ids[0])
    assert server.running() == ids[1:3]
    assert server.jobs.in_flight == 2
    assert not sent.ahead
    assert sent.begun > before
    server.step(ids[1], 4, 4)
    server.step(ids[2], 4, 4)
    assert server.running() == ids[1:5]
    server.finish_all()
    assert {server.state(one) for one in ids} == {"completed"}


def test_a_job_that_was_sent_ahead_has_not_run(server: Server) -> None:
    ids = [server.put() for _ in range(3)]
    server.step(ids[0], 4, 4)
    assert server.running() == ids
    server.die()
    assert [server.job(one).deaths for one in ids] == [1, 1, 0]
    server.step(ids[1], 4, 4)
    server.store.request_cancel(ids[2])
    server.jobs.wake()
    assert server.cancels() == {server.key(ids[2])}
    server.leave(ids[2], cancelled=True)
    assert server.state(ids[2]) == "cancelled"
    assert server.jobs.in_flight == 2
    server.finish_all()


def test_memory_for_a_job_that_is_sent_ahead(server: Server) -> None:
    """A finishing job makes room."""
    sizes = {name: {"height": side, "width": side} for name, side in (("small", 64), ("large", 256))}
    server.jobs.cost_history.out_of_memory(64 * 64 + 256 * 256 + 1)
    small, large = server.put(**sizes["small"]), server.put(**sizes["large"])
    next_large, next_small = server.put(cost=2.0, **sizes["large"]), server.put(cost=3.0, **sizes["small"])
    assert server.running() == [small, large]
    server.step(small, 4, 4)
    assert server.running() == [small, large]  # two large ones do not fit
    server.step(large, 4, 4)
    assert server.running() == [small, large]  # which of them leaves first is not known
    server.leave(large)
    assert server.running() == [small, next_large, next_small]  # the other small one leaves, too
    assert server.jobs.in_flight == 2
    server.finish_all()


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


@pytest.mark.parametrize("server", [{"pipeline_parallel_size": 2, "data_parallel_size": 2}], indirect=True)
def test_a_free_slot_comes_before_one_that_will_be_free(server: Server) -> None:
    ids = [server.put() for _ in range(3)]  # two on the first replica, one on the second
    server.step(ids[0], 4, 4)
    server.step(ids[2], 4, 4)
    others = [server.put() for _ in range(2)]
    found = {one.job.id: (one.replica, one.ahead) for one in server.jobs.running.values()}
    assert [found[one] for one in others] == [(1, False), (0, True)]
    server.finish_all()


@pytest.mark.parametrize("server", [{"pipeline_parallel_size": 2, "data_parallel_size": 2}], indirect=True)
def test_a_replica_with_memory_comes_before_one_with_none(server: Server) -> None:
    server.jobs.cost_history.out_of_memory(1000 * 1000)
    large, *small = [server.put(cost=cost, height=side, width=side) for cost, side in ((1, 995), (2, 140), (3, 140))]
    where = {one.job.id: one.replica for one in server.jobs.running.values()}
    assert where == {large: 0, small[0]: 1, small[1]: 1}
    server.finish_all()


def test_nothing_begins_before_the_ranks_are_up_or_while_they_fail(server: Server) -> None:
    server.rank_group.failing = True
    first = server.put()
    assert server.running() == []
    server.rank_group.failing = False
    server.jobs.down(Failure("rank 0 has ended"))
    server.jobs.wake()
    assert server.state(first) == "queued"
    server.jobs.ready([INFO, INFO])
    assert server.running() == [first]


def test_measured_memory_decides_how_many_run(server: Server) -> None:
    cost_history, work = server.jobs.cost_history, work_of({"height": 8, "width": 8}, SIGNATURE)
    cost_history.record_idle_memory([ModelInfo(SIGNATURE, held_bytes=held, limit_bytes=10_000) for held in (100, 50)])
    cost_history.completed(work, 1.0, 64, 8_500)  # pixels of one job; two have not been seen
    ids = [server.put() for _ in range(4)]
    assert server.running() == ids[:1]
    server.complete(ids[0])
    assert server.running() == ids[1:2]
    cost_history.completed(work, 1.0, 128, 8_900)
    server.jobs.wake()
    assert server.running() == ids[1:3]
    cost_history.record_idle_memory([ModelInfo(SIGNATURE, held_bytes=100, limit_bytes=9_000)])
    server.complete(ids[1])
    assert server.running() == ids[2:3]
    server.complete(ids[2])
    assert server.running() == ids[3:]  # alone it is tried in any case


def test_progress_is_reported(server: Server) -> None:
    job_id = server.put()
    for step in range(5):
        server.step(job_id, step)
    steps = [message for message in server.told if isinstance(message, StepDone)]
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


# Input pictures.


def test_pictures_are_decoded_in_another_thread(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    real = prefetcher.build_request

    def slow(*given: Any) -> Any:
        assert go_on.wait(60)
        return real(*given)

    monkeypatch.setattr(prefetcher, "build_request", slow)
    job_id = server.put(inputs={"input-0.png": picture()})  # returns
    assert server.state(job_id) == "queued"
    for _ in range(5):
        server.jobs.wake()
    go_on.set()
    server.until(lambda: server.running() == [job_id])
    (sent,) = [message for rank, message in server.rank_group.sent if isinstance(message, Begin) and rank == 1]
    assert [image.size for image in sent.load().images] == [(32, 24)]
    server.complete(job_id)
    assert server.state(job_id) == "completed"


def test_pictures_are_there_when_a_slot_is_free(server: Server) -> None:
    ids = [server.put(), server.put(), server.put(inputs={"input-0.png": picture()})]
    server.until(lambda: server.jobs.prefetcher._built)
    server.complete(ids[0])
    assert server.running() == ids[1:]


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_pictures_that_cannot_be_read(server: Server, how: str) -> None:
    busy = [server.put(), server.put()]
    bad = server.put(inputs={"input-0.png": b"no picture"})
    if how == "gone":
        (server.store.files_of(bad) / "input-0.png").unlink()
    good = server.put(inputs={"input-0.png": picture()})
    for job_id in busy:
        server.complete(job_id)
    server.until(lambda: server.running() == [good])
    assert server.job(bad).error["code"] == "invalid_request"  # type: ignore[index]
    assert "input-0.png" in server.job(bad).error["message"]  # type: ignore[index]


def test_a_job_that_overtakes_one_whose_pictures_are_decoded(server: Server) -> None:
    server.put(), server.put()
    slow = server.put(cost=100.0, inputs={"input-0.png": picture()})
    server.until(lambda: server.jobs.prefetcher._built)
    quick = server.put(inputs={"input-0.png": picture(), "input-1.png": picture()})
    for _ in range(2):
        server.complete(server.running()[0])
    server.until(lambda: server.running() == [quick, slow])
    counts = {one.job.id: len(one.request.images) for one in server.jobs.running.values()}
    assert counts == {quick: 2, slow: 1}


def test_pictures_of_cancelled_jobs_are_released(server: Server) -> None:
    first, second = server.put(), server.put()
    job_id = server.put(inputs={"input-0.png": picture()})
    server.until(lambda: server.jobs.prefetcher._built)
    server.store.request_cancel(job_id)
    server.jobs.wake()
    assert server.jobs.prefetcher._built is None
    assert server.running() == [first, second]


def test_ranks_that_die_while_pictures_are_decoded(server: Server) -> None:
    job_id = server.put(inputs={"input-0.png": picture()})
    server.die()
    server.until(lambda: server.running() == [job_id])
    assert server.job(job_id).deaths == 0


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
    sent = [(rank, message) for rank, message in server.rank_group.sent if isinstance(message, Cancel)]
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
    server.jobs.on_rank_message(0, RequestFinished(key, "sum"))
    server.die()
    server.jobs.on_rank_message(1, RequestFinished(key, "sum"))
    server.jobs.on_rank_message(0, Progress(key, 3, 4))
    assert server.key(job_id) != key
    assert server.jobs.running[server.key(job_id)].on_ranks.finished == {}
