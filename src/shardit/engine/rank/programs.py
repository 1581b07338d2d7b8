"""Requests of a rank that are programs of their own, as those of pipelines."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Any

from shardit.core.runtime.program import Interrupted, Program
from shardit.engine.rank.outcomes import Outcomes, ReceivedRequest


class Programs:
    """At most `max_in_flight` programs at once; further requests wait. ahead: whether commands count a round later.
    can_cancel: whether requests may be cancelled while they run."""

    def __init__(self, session: Any, outcomes: Outcomes, *, ahead: bool, can_cancel: bool):
        self.session, self.outcomes = session, outcomes
        self.waiting: deque[ReceivedRequest] = deque()
        self.running: dict[Program, ReceivedRequest] = {}
        self._ahead, self._can_cancel = ahead, can_cancel

    def could_begin(self, active: int) -> bool:
        """Return whether another request could begin next to `active` programs."""
        return active < self.session.spec.max_in_flight and not self.waiting

    def add(self, received: ReceivedRequest) -> None:
        """Queue a request."""
        self.waiting.append(received)

    def cancel(self, key: int) -> None:
        """End a request: at once if it waits, at its next turn if it runs."""
        for received in [received for received in self.waiting if received.key == key]:
            self.waiting.remove(received)
            self.outcomes.cancelled_waiting(received.key)
        for program, received in self.running.items():
            if received.key == key:
                program.interrupted = True

    def next(self, active: int) -> Program | None:
        """Return the program of the next request, if it may begin."""
        if not self.waiting or active >= self.session.spec.max_in_flight:
            return None
        received = self.waiting.popleft()
        program = self.session.program(received.request, self._progress(received.key))
        self.running[program] = replace(received, begun=time.perf_counter())
        return program

    def finish(self, program: Program) -> None:
        """Report the outcome of a program."""
        received = self.running.pop(program)
        if isinstance(program.error, Interrupted):
            # Its remaining work in flight may take long and is not to count against later requests.
            self.session.loop.schedule.drain()
            self.outcomes.ended(received, program.start, None, cancelled=True)
        elif program.error is not None:
            self.outcomes.failed(received, program.error, program.start)
        else:
            self.outcomes.ended(received, program.start, program.value)

    def of_program(self, program: Program | None) -> ReceivedRequest | None:
        """Return the request that a program runs."""
        return None if program is None else self.running.get(program)

    def _progress(self, key: int) -> Any:
        def report(_: int, step: int, total: int, made: Any = None) -> None:
            self.outcomes.progress(key, step, total, made)
            if self._can_cancel:  # other requests wait for an answer, and this one may be cancelled
                # If commands count a round later, a step in one turn (a first call) ends only in the round after.
                self.session.loop.yield_turn(2 if self._ahead else 1)

        return report
