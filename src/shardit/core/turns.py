"""Several requests in flight: each program runs until it needs a pending result, then the next one has its turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_leaves

from ..errors import RankError
from .coroutine import Coroutine, Generators
from .schedule import Flight, Schedule


class Interrupted(Exception):
    """Ends a program at the beginning of a turn, because somebody asked for it."""


@dataclass(eq=False)
class Program:
    """One request: a function to run, the seed of its global generators, and what became of it.

    start: a checksum of what its first transformer call is given, the same on every rank that drew the same noise.
    Setting `interrupted`, on every rank between the same two turns, ends it at its next turn with Interrupted.
    """

    run: Callable[[], Any]
    seed: int
    value: Any = None
    error: Exception | None = None
    turns: int = 0
    start: str | None = None
    interrupted: bool = False
    coroutine: Coroutine | None = field(default=None, repr=False)
    generators: Generators | None = field(default=None, repr=False)
    waits_for: Flight | None = field(default=None, repr=False)


class Turns:
    """Runs programs as coroutines over one schedule. The order of turns depends on nothing but the programs, so it is
    the same on every rank: a program yields when it first needs a result, whether or not the data is already there."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.current: Program | None = None
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

    def mark_start(self, arguments: Any) -> None:
        """Once per request: note what its first call is given. Whoever runs the requests compares the marks of all
        ranks; doing it here would make every rank wait for the others and drain the pipeline."""
        program = self.current
        if program is None or program.start is not None:
            return
        first = next((t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)), None)
        if first is None:
            program.start = "no tensor"
        else:
            wide = first.double()
            program.start = repr((tuple(first.shape), float(wide.sum()), float(wide.abs().sum())))

    def run(self, programs: Iterator[Program], max_in_flight: int) -> Iterator[Program]:
        """Run all programs, at most `max_in_flight` at once; yields each when it has ended, with value or error.

        One program enters per round, so that they stand at different segments. Programs in step would all end a step
        in the same round, and every rank would wait for the last of their results before it goes on with the first.
        An Exception of a program ends that program only; RankError and anything not an Exception ends all.
        """
        outer = Generators.capture()
        active: list[Program] = []
        more = True
        try:
            while active or more:
                if more and len(active) < max_in_flight:
                    program = next(programs, None)
                    if program is None:
                        more = False
                    else:
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
        finally:
            for program in active:  # only where something ended all of them
                if program.coroutine is not None:
                    program.coroutine.kill()
            self.current = self._installed = None
            outer.install()

    def _turn(self, program: Program) -> None:
        if program.coroutine is None:
            program.coroutine = Coroutine(program.run)
        self._switch_generators(program)
        program.turns += 1
        self.current = program
        try:
            program.coroutine.resume()
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            program.error = error
        finally:
            self.current = None
        if program.coroutine.done:
            program.value = program.coroutine.value

    def _switch_generators(self, program: Program) -> None:
        if self._installed is program:
            return
        if self._installed is not None:
            self._installed.generators = Generators.capture()
        if program.generators is None:
            torch.manual_seed(program.seed)
            random.seed(program.seed)
            numpy.random.seed(program.seed % 2**32)
        else:
            program.generators.install()
        self._installed = program
