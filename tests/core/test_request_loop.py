"""Programs in turns over one schedule: order, randomness, errors, and how many at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardit.core.runtime.pending import PendingSource
from shardit.core.runtime.program import Program
from shardit.core.runtime.request_loop import RequestLoop, Schedule
from shardit.errors import RankError


class Call:
    """A flight over `segments` segments that all belong to this rank and do nothing."""

    def __init__(self, segments: int = 3):
        self.owners = [0] * segments
        self.finished = False

    def begin(self) -> None: ...
    def run(self, segment: int) -> None: ...
    def post(self, segment: int) -> None: ...
    def finish(self) -> None: ...


class Machine:
    """A request loop and a log of its programs' actions."""

    def __init__(self) -> None:
        self.loop = RequestLoop(Schedule(0))
        self.log: list[Any] = []
        self.running = 0
        self.most = 0

    def call(self, value: float = 1.0, segments: int = 3) -> torch.Tensor:
        """Return a pending tensor, as a staged transformer does."""
        flight = Call(segments)
        buffer = torch.full((2,), float("nan"))
        self.loop.schedule.start(flight)

        def materialize() -> None:
            self.loop.wait_for(flight)
            buffer.fill_(value)

        return PendingSource(materialize).wrap(buffer)

    def request(self, name: str, steps: int, work: Callable[[int], Any] | None = None) -> Callable[[], list[Any]]:
        """A program of `steps` steps, each of which uses a pending tensor."""

        def run() -> list[Any]:
            self.running += 1
            self.most = max(self.most, self.running)
            out = []
            try:
                for step in range(steps):
                    self.log.append((name, step))
                    out.append(work(step) if work else None)
                    assert (self.call(step) + 1).tolist() == [step + 1] * 2
            finally:
                self.running -= 1
            return out

        return run

    def run(self, programs: list[Program], max_in_flight: int) -> list[Program]:
        return list(self.loop.run(iter(programs), max_in_flight))


def test_programs_take_turns() -> None:
    machine = Machine()
    programs = [Program(machine.request(name, 3), 0) for name in "ab"]
    assert machine.run(programs, 2) == programs
    assert [p.error for p in programs] == [None, None]
    assert sorted(machine.log) == [(name, step) for name in "ab" for step in range(3)]
    assert machine.log.index(("b", 0)) < machine.log.index(("a", 1))
    assert machine.loop.schedule.active == []
    assert machine.loop.current is None


def test_two_calls_of_a_step_are_in_flight_at_once() -> None:
    machine = Machine()

    def guided() -> float:
        one, two = machine.call(1), machine.call(2)
        return float((one + two).sum())

    (program,) = machine.run([Program(guided, 0)], 1)
    assert program.value == 6
    assert machine.loop.schedule.most_in_flight == 2


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_at_most_so_many_at_once(limit: int, segments: int) -> None:
    machine = Machine()
    plain = machine.call
    machine.call = lambda value=1.0, _=0: plain(value, segments)  # type: ignore[method-assign]
    programs = [Program(machine.request(str(i), 2 + i % 3), i) for i in range(6)]
    ended = machine.run(programs, limit)
    assert machine.most <= limit
    assert (machine.most > 1) == (limit > 1 and segments > 1)
    assert sorted(map(id, ended)) == sorted(map(id, programs))
    if limit == 1:
        assert ended == programs


def test_programs_are_asked_for_only_when_there_is_room() -> None:
    machine = Machine()
    asked: list[int] = []

    def make() -> Iterator[Program]:
        for i in range(4):
            asked.append(i)
            yield Program(machine.request(str(i), 2), i)

    for ended, _ in enumerate(machine.loop.run(make(), 2), 1):
        assert len(asked) <= ended + 2
    assert asked == [0, 1, 2, 3]


def randomness(_: int = 0) -> tuple[Any, ...]:
    """Draws from every global generator."""
    return (
        torch.randn(3).tolist(),
        torch.randperm(5).tolist(),
        random.random(),
        np.random.rand(),
        np.random.randint(9),
    )


def one_by_one(seeds: list[int], steps: list[int]) -> list[list[Any]]:
    """Return the random numbers of each request when it runs alone, seeded first."""
    out = []
    for seed, count in zip(seeds, steps, strict=True):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        out.append([randomness() for _ in range(count)])
    return out


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 4)), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_generators_belong_to_the_program(requests: list[tuple[int, int]], limit: int) -> None:
    seeds, steps = [list(column) for column in zip(*requests, strict=True)]
    expected = one_by_one(seeds, steps)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    outside = randomness()
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    machine = Machine()
    programs = [Program(machine.request(str(i), n, randomness), s) for i, (s, n) in enumerate(requests)]
    machine.run(programs, limit)
    assert [p.value for p in programs] == expected
    assert randomness() == outside  # the caller's generators are as before


def test_an_error_ends_its_program_only() -> None:
    machine = Machine()

    def fail(step: int) -> None:
        if step == 1:
            machine.call()  # left in flight: the other ranks count on it
            raise ValueError("bad prompt")

    expected = one_by_one([0, 2], [3, 3])
    works = [randomness, fail, randomness]
    programs = [Program(machine.request(str(i), 3, work), i) for i, work in enumerate(works)]
    machine.run(programs, 3)
    assert [p.value for p in programs] == [expected[0], None, expected[1]]
    assert [type(p.error) for p in programs] == [type(None), ValueError, type(None)]
    machine.loop.schedule.drain()
    assert machine.loop.schedule.active == []


def test_an_error_before_the_first_call_and_a_program_without_calls() -> None:
    machine = Machine()
    programs = [Program(lambda: 1 // 0, 0), Program(lambda: "nothing to do", 0), Program(machine.request("a", 2), 0)]
    ended = machine.run(programs, 2)
    assert isinstance(programs[0].error, ZeroDivisionError)
    assert programs[1].value == "nothing to do"
    assert ended[-1] is programs[2]


@pytest.mark.parametrize("error", [RankError(1, "gone"), MemoryError(), KeyboardInterrupt()])
def test_errors_that_end_all_programs(error: BaseException) -> None:
    machine = Machine()

    def fail(step: int) -> None:
        if step == 1:
            raise error

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    programs = [Program(machine.request(str(i), 3, work), i) for i, work in enumerate([None, fail])]
    with pytest.raises(type(error)):
        machine.run(programs, 2)
    assert machine.loop.current is None
    assert torch.equal(torch.rand(1), expected)


def test_modes_of_programs_do_not_mix() -> None:
    machine = Machine()
    seen: dict[str, set[Any]] = {"a": set(), "b": set(), "c": set()}

    def run(name: str, mode: Any) -> None:
        with mode:
            for _ in range(4):
                seen[name].add(
                    (
                        torch.is_grad_enabled(),
                        torch.is_inference_mode_enabled(),
                        (torch.ones(2, 2) @ torch.ones(2, 2)).dtype,
                    )
                )
                machine.call().sum()

    modes = {"a": torch.no_grad(), "b": torch.inference_mode(), "c": torch.autocast("cpu", torch.bfloat16)}
    programs = [Program(lambda name=name, mode=mode: run(name, mode), 0) for name, mode in modes.items()]
    machine.run(programs, 3)
    assert [p.error for p in programs] == [None] * 3
    assert seen == {
        "a": {(False, False, torch.float32)},
        "b": {(False, True, torch.float32)},
        "c": {(True, False, torch.bfloat16)},
    }


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=6), st.integers(1, 4), st.integers(1, 6))
def test_the_order_depends_on_nothing_but_the_programs(steps: list[int], limit: int, segments: int) -> None:
    def once() -> tuple[Any, ...]:
        machine = Machine()
        plain = machine.call
        machine.call = lambda value=1.0, _=0: plain(value, segments)  # type: ignore[method-assign]
        programs = [Program(machine.request(str(i), n), i) for i, n in enumerate(steps)]
        ended = machine.run(programs, limit)
        return machine.log, [programs.index(p) for p in ended], [p.turns for p in programs]

    assert once() == once()


def test_programs_stand_at_different_segments() -> None:
    """One enters per round: programs in step would leave all ranks but one idle whenever they end a step together."""
    machine = Machine()
    programs = [Program(machine.request(str(i), 3), i) for i in range(3)]
    machine.run(programs, 3)
    assert machine.log[:6] == [("0", 0), ("1", 0), ("2", 0), ("0", 1), ("1", 1), ("2", 1)]
    assert [p.turns for p in programs] == [4, 4, 4]


def test_outside_of_programs_a_wait_runs_the_schedule() -> None:
    machine = Machine()
    one, two = machine.call(1), machine.call(2, 9)
    assert float(two[0] + one[0]) == 3
    assert machine.loop.schedule.active == []


def test_what_counts_as_out_of_memory() -> None:
    def allocate() -> None:
        torch.empty(2**60)

    machine = Machine()
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        machine.run([Program(allocate, 0)], 1)
    (program,) = machine.run([Program(lambda: (_ for _ in ()).throw(RuntimeError("another")), 0)], 1)
    assert isinstance(program.error, RuntimeError)
