"""Requests of a rank that are programs of their own, as those of pipelines."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Any

from shardit.core.runtime.program import Interrupted, Program
from shardit.engine.rank.outcomes import Outcomes, Taken


class Programs:
    """At most `max_in_flight` programs at once; further requests wait. ahead: whether commands count a round later.
    can_cancel: whether requests may be cancelled while they run."""

    def __init__(self, session: Any, outcomes: Outcomes, *, ahead: bool, can_cancel: bool):
        self.session, self.outcomes = session, outcomes
        self.waiting: deque[Taken] = deque()
        self.running: dict[Program, Taken] = {}
        self._ahead, self._can_cancel = ahead, can_cancel

    def could_begin(self, active: int) -> bool:
        """Return whether another request could begin next to `active` programs."""
        return active < self.session.spec.max_in_flight and not self.waiting

    def add(self, taken: Taken) -> None:
        """Queue a request."""
        self.waiting.append(taken)

    def cancel(self, key: int) -> None:
        """End a request: at once if it waits, at its next turn if it runs."""
        for taken in [taken for taken in self.waiting if taken.key == key]:
            self.waiting.remove(taken)
            self.outcomes.left(taken.key)
        for program, taken in self.running.items():
            if taken.key == key:
                program.interrupted = True

    def next(self, active: int) -> Program | None:
        """Return the program of the next request, if it may begin."""
        if not self.waiting or active >= self.session.spec.max_in_flight:
            return None
        taken = self.waiting.popleft()
        program = self.session.program(taken.request, self._progress(taken.key))
        self.running[program] = replace(taken, begun=time.perf_counter())
        return program

    def finish(self, program: Program) -> None:
        """Report the outcome of a program."""
        taken = self.running.pop(program)
        if isinstance(program.error, Interrupted):
            # Its remaining work in flight may take long and is not to count against later requests.
            self.session.loop.schedule.drain()
            self.outcomes.ended(taken, program.start, None, cancelled=True)
        elif program.error is not None:
            self.outcomes.failed(taken, program.error, program.start)
        else:
            self.outcomes.ended(taken, program.start, program.value)

    def of_program(self, program: Program | None) -> Taken | None:
        """Return the request that a program runs."""
        return None if program is None else self.running.get(program)

    def _progress(self, key: int) -> Any:
        def report(_: int, step: int, total: int, made: Any = None) -> None:
            self.outcomes.progress(key, step, total, made)
            if self._can_cancel:  # other requests wait for an answer, and this one may be cancelled
                # If commands count a round later, a step in one turn (a first call) ends only in the round after.
                self.session.loop.yield_turn(2 if self._ahead else 1)

        return report
