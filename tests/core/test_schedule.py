"""The schedule, replayed against a model of in-order communicators: it never hangs, and takes the time it should."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardit.core.placement.partition import bound
from shardit.core.runtime.request_loop import Schedule
from shardit.core.simulate.record import RankLog
from shardit.core.simulate.replay import (
    GROUPINGS,
    Op,
    Workload,
    deadlock_free,
    execute,
    one_for_all,
    per_pair,
    record,
    timeline,
)

WORKLOADS = st.builds(
    Workload,
    ranks=st.integers(1, 8),
    chunks=st.integers(1, 8),
    branches=st.integers(1, 6),
    requests=st.integers(1, 4),
    steps=st.integers(1, 2),
    max_in_flight=st.integers(1, 4),
    max_outstanding=st.sampled_from([0, 1, 3, 64]),
)


def ops_of(logs: list[RankLog]) -> list[list[Op]]:
    return [log.ops for log in logs]


@settings(max_examples=40, deadline=None)
@given(WORKLOADS)
def test_never_hangs_and_every_segment_runs_once(load: Workload) -> None:
    logs = record(load)
    for grouping in GROUPINGS:
        run = execute(ops_of(logs), grouping)
        assert not run.hangs, (grouping.__name__, run.stuck, run.unmatched)
    segments = load.ranks * load.chunks
    assert all(log.steps == logs[0].steps for log in logs)  # one total order
    assert sorted(logs[0].steps) == [(call, segment) for call in range(load.calls) for segment in range(segments)]
    for rank, log in enumerate(logs):
        computed = [(op.call, op.segment) for op in log.ops if op.kind == "compute"]
        assert computed == [step for step in log.steps if step[1] % load.ranks == rank]
        for call in range(load.calls):
            of_call = [segment for number, segment in computed if number == call]
            assert of_call == list(range(rank, segments, load.ranks))


@settings(max_examples=40, deadline=None)
@given(WORKLOADS)
def test_every_message_is_posted_once_at_each_end_and_taken_before_use(load: Workload) -> None:
    logs = record(load)
    sent = [op.message for log in logs for op in log.ops if op.kind == "send"]
    received = [op.message for log in logs for op in log.ops if op.kind == "recv"]
    assert len(set(sent)) == len(sent)
    assert sorted(sent) == sorted(received)
    hops = 0 if load.ranks == 1 else load.ranks * load.chunks - 1
    assert len(sent) == load.calls * (hops + load.ranks - 1)
    for log in logs:
        waited = set()
        for op in log.ops:
            if op.kind == "wait":
                waited.add(op.message)
            elif op.kind == "compute" and op.segment > 0 and load.ranks > 1:
                assert (op.call, op.segment - 1, op.segment % load.ranks, False) in waited


def late_receives(ops: list[Op]) -> list[Op]:
    """Negative control: each receive is posted when its message is asked for, not at its place in the total order."""
    out: list[Op] = []
    waiting: dict[object, Op] = {}
    for op in ops:
        if op.kind == "recv":
            waiting[op.message] = op
        else:
            if op.kind == "wait" and op.message in waiting:
                out.append(waiting.pop(op.message))
            out.append(op)
    return out + list(waiting.values())


def swapped_results(ops: list[Op]) -> list[Op]:
    """Negative control: a rank that posts the receives of the first two results the other way round."""
    first, second = [i for i, op in enumerate(ops) if op.kind == "recv" and op.result][:2]
    ops = list(ops)
    ops[first], ops[second] = ops[second], ops[first]
    return ops


@pytest.mark.parametrize("grouping", [per_pair, one_for_all])
def test_checker_finds_receives_posted_on_arrival(grouping) -> None:
    ops = ops_of(record(Workload(2, 4, 2)))
    assert deadlock_free(ops, grouping)
    run = execute([late_receives(of_rank) for of_rank in ops], grouping)
    assert run.hangs
    assert set(run.stuck) == {0, 1}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("rank", [0, 1])
def test_checker_finds_results_posted_in_another_order(grouping, rank: int) -> None:
    ops = ops_of(record(Workload(3, 2, 2, steps=2)))
    assert deadlock_free(ops, grouping)
    ops[rank] = swapped_results(ops[rank])
    assert not deadlock_free(ops, grouping)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_checker_finds_a_rank_with_other_turns(grouping) -> None:
    """A rank that takes requests in another order, as one would that looks whether the data is there already."""
    ops = ops_of(record(Workload(2, 2, 1, requests=2, steps=2, max_in_flight=2)))
    other = {0: 1, 1: 0, 2: 3, 3: 2}
    ops[1] = [Op(op.kind, other[op.call], op.segment, op.source, op.target, op.result) for op in ops[1]]
    assert not deadlock_free(ops, grouping)


def test_checker_finds_messages_never_received() -> None:
    ops = ops_of(record(Workload(2)))
    ops[0] = [op for op in ops[0] if op.kind == "compute"]
    run = execute(ops)
    assert run.hangs
    assert run.stuck == {1: Op("wait", 0, 0, 0, 1)}


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
@pytest.mark.parametrize("branches", [1, 2, 3, 6])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_time_without_hop_cost_is_the_bound(ranks: int, branches: int, chunks: int) -> None:
    got = timeline(Workload(ranks, chunks, branches))
    assert got.speedup == pytest.approx(bound(branches, ranks, chunks), rel=1e-9)
    assert sum(got.idle) / ranks == pytest.approx(1 - got.speedup / ranks)


@pytest.mark.parametrize(("chunks", "expected"), [(1, 4 / 3), (2, 8 / 5), (4, 16 / 9), (8, 32 / 17)])
def test_guided_request_on_two_ranks(chunks: int, expected: float) -> None:
    """The headline numbers: steps follow each other without a gap, and 8 chunks reach 1.88x."""
    assert timeline(Workload(2, chunks, 2, steps=10)).speedup == pytest.approx(expected)


def test_several_requests_hide_the_fill() -> None:
    one = timeline(Workload(4, 1, 1, requests=1, steps=20))
    four = timeline(Workload(4, 1, 1, requests=4, steps=20, max_in_flight=4))
    assert one.speedup == pytest.approx(1)
    assert four.speedup > 3.8


def test_traffic_per_step_and_cost_of_hops() -> None:
    load = Workload(2, 4, 2, steps=5)
    free = timeline(load, hop_bytes=10, result_bytes=1)
    assert (free.hops_per_step, free.results_per_step, free.bytes_per_step) == (14, 2, 142)
    slow = timeline(load, hop_cost=0.1)
    assert free.makespan < slow.makespan < free.makespan + 5 * 2 * 8 * 0.1 + 1e-9
    assert timeline(load, chunk_cost=2.0).makespan == 2 * free.makespan


class Failing:
    """A flight that fails in `begin`."""

    owners = (0, 1)
    finished = False

    def begin(self) -> None:
        raise ValueError("bad input")


def test_a_call_that_fails_at_its_start_leaves_the_schedule() -> None:
    schedule = Schedule(0)
    with pytest.raises(ValueError, match="bad input"):
        schedule.start(Failing())  # type: ignore[arg-type]
    assert schedule.active == []
    assert schedule._next == {}
    schedule.drain()
