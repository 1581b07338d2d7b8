"""The order of all steps on a rank: the calls in flight, and the requests that make them.

Each request is a program that runs until it needs a pending result, then the next one has its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shardit.core.runtime.coroutine import Coroutine
from shardit.core.runtime.digests import SUMMED, digests
from shardit.core.runtime.program import Flight, Interrupted, Program, is_out_of_memory
from shardit.core.runtime.thread_state import Generators
from shardit.errors import RankError


class Schedule:
    """Advances all calls in flight, each by one segment per tick, in the order in which they started.

    It knows no tensors, so that a model of in-order communicators can replay what it issues (`core/simulate`).

    Every rank executes the same steps in the same order; a rank does its part of each (run, post, or nothing). Each
    message is posted by its receiver at the step at which its sender sends it, so all communication is a projection of
    one total order and cannot wait in a circle, whatever communicators carry it.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.active: list[Flight] = []
        self.most_in_flight = 0
        self._next: dict[int, int] = {}  # id of the flight -> segment of its next step

    def start(self, flight: Flight) -> None:
        """Begin a call and take its first step at once, so that the caller may go on to its next call."""
        self.active.append(flight)
        self.most_in_flight = max(self.most_in_flight, len(self.active))
        self._next[id(flight)] = 0
        try:
            flight.begin()
            self._step(flight)
        except BaseException:
            self._drop(flight)
            raise

    def tick(self) -> None:
        """One step of every call in flight."""
        for flight in list(self.active):
            self._step(flight)

    def drain(self, flight: Flight | None = None) -> None:
        """Tick until `flight` (or everything) is virtually done."""
        while self.active if flight is None else not flight.finished:
            self.tick()

    def _step(self, flight: Flight) -> None:
        segment = self._next[id(flight)]
        owners = flight.owners
        if segment > 0 and owners[segment] == self.rank:
            flight.run(segment)
        if segment + 1 < len(owners):
            if owners[segment + 1] == self.rank:
                flight.post(segment)
            self._next[id(flight)] = segment + 1
        else:
            flight.finish()
            flight.finished = True
            self._drop(flight)

    def _drop(self, flight: Flight) -> None:
        self._next.pop(id(flight), None)
        self.active = [f for f in self.active if f is not flight]


class RequestLoop:
    """Runs programs as coroutines over one schedule. The order of turns depends on nothing but the programs, so it is
    the same on every rank: a program yields when it first needs a result, whether or not the data is already there."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.current: Program | None = None
        self.last: Program | None = None
        self._installed: Program | None = None

    def wait_for(self, flight: Flight) -> None:
        """Return when `flight` is virtually done; other programs run meanwhile."""
        program = self.current
        if program is None:
            self.schedule.drain(flight)
            return
        while not flight.finished:
            program.waits_for = flight
            assert program.coroutine is not None
            program.coroutine.pause()
            if program.interrupted:
                raise Interrupted("the request was interrupted")
        program.waits_for = None

    def mark_start(self, arguments: Callable[[], Mapping[str, Any]]) -> None:
        """Once per request: note what its first call is given. The caller of `rounds` compares the marks of all
        ranks; doing it here would make every rank wait for the others and drain the pipeline."""
        program = self.current
        if program is not None and program.start is None:
            program.start = ", ".join(f"{name} {value.hex()}" for name, value in digests(arguments(), SUMMED).items())

    def run(self, programs: Iterator[Program], max_in_flight: int) -> Iterator[Program]:
        """Run all programs, at most `max_in_flight` at once; yields each when it has ended, with value or error.

        One program enters per round, so that they stand at different segments. Programs in step would all end a step
        in the same round, and every rank would wait for the last of their results before it goes on with the first.
        An Exception of a program ends that program only; RankError and anything not an Exception ends all.
        """

        def enter(active: int) -> Program | None:
            nonlocal more
            program = next(programs, None) if more and active < max_in_flight else None
            more = more and (program is not None or active >= max_in_flight)
            return program

        more = True
        yield from self.rounds(enter, lambda active: active > 0 or more)

    def rounds(
        self, enter: Callable[[int], Program | None], goes_on: Callable[[int], bool] = lambda active: True
    ) -> Iterator[Program]:
        """Rounds in which every program has a turn. `enter` is called before each round with the number of programs
        in flight, and gives the one that is to join them, if any; `goes_on`, at the end of each round, whether there
        is to be another. Both must answer alike on every rank. Yields programs as `run` does."""
        outer = Generators.capture()
        active: list[Program] = []
        going = True
        try:
            while going:
                program = enter(len(active))
                if program is not None:
                    active.insert(0, program)  # first in its round: it waits for nothing yet
                for program in list(active):
                    waits = program.waits_for is not None and not program.waits_for.finished
                    if waits and not program.interrupted:
                        continue
                    self._turn(program)
                    if program.coroutine is not None and program.coroutine.done:
                        active.remove(program)
                        yield program
                self.schedule.tick()
                going = goes_on(len(active))
        finally:
            for program in active:  # only if something ended all of them
                if program.coroutine is not None:
                    program.coroutine.kill()
            self.current = self._installed = None
            outer.install()

    def yield_turn(self, rounds: int = 1) -> None:
        """Give the others a turn in `rounds` rounds, if the program that runs has had no pause since it was here last.
        Programs that never wait for a result do so once per step, so that others can run meanwhile, and they can be
        ended."""
        program = self.current
        if program is None:
            return
        if program.turns == program.yielded_at:
            assert program.coroutine is not None
            for _ in range(rounds):
                program.coroutine.pause()
        if program.interrupted:
            raise Interrupted("the request was interrupted")
        program.yielded_at = program.turns

    def yield_to_others(self) -> None:
        """Let other programs go on, or one begin. All ranks must call this at the same points of a program, which may
        wait for messages that are under way: so it is not interrupted here."""
        program = self.current
        if program is not None:
            assert program.coroutine is not None
            program.coroutine.pause()

    def _turn(self, program: Program) -> None:
        if program.coroutine is None:
            program.coroutine = Coroutine(program.run)
        self._switch_generators(program)
        program.turns += 1
        self.current = self.last = program
        try:
            program.coroutine.resume()
        except RankError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            program.error = error
        finally:
            self.current = None
        if program.coroutine.done:
            program.value = program.coroutine.value

    def _switch_generators(self, program: Program) -> None:
        if program.seed is None or self._installed is program:
            return
        if self._installed is not None:
            self._installed.generators = Generators.capture()
        if program.generators is None:
            Generators.seed(program.seed)
        else:
            program.generators.install()
        self._installed = program
