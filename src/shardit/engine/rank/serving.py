"""The requests of a rank: they arrive and finish one by one, at the boundaries of rounds.

Every rank of a replica reads the same commands in the same order from a channel of its own. Ranks only have to agree on
the time: for each round the first rank of the replica sends the number of commands that take effect, in eight bytes.
Stages go through a step in several rounds, and not in step with each other: there it sends the number a round ahead, so
that no rank waits for it. Otherwise it sends the number at the beginning of the round, so that a cancelled request ends
with its present step; if no server can cancel a request, only in rounds in which another could begin. While nothing
runs, ranks wait at their channels. A request that arrives while all slots are taken enters in the round after one has
ended.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from dataclasses import replace
from typing import Any

from shardit.core.runtime.digests import short_hash
from shardit.core.runtime.request_loop import Interrupted, Program, is_out_of_memory
from shardit.engine.process.channel import Channel
from shardit.engine.process.memory import reset_peak
from shardit.engine.process.messages import Begin, Cancel, OutOfMemory, Progress, RequestFinished
from shardit.engine.rank.counts import Counts, readable
from shardit.engine.rank.outcomes import Outcomes, Taken
from shardit.errors import InputError
from shardit.logs import logger


class ServingWorker:
    """The received commands, the running programs, and the number of commands for each round."""

    def __init__(self, session: Any, channel: Channel):
        self.session = session
        self.channel = channel
        self.counts = Counts(session)
        self.commands: deque[Any] = deque()
        self.waiting: deque[Taken] = deque()
        self.running: dict[Program, Taken] = {}
        self.in_batches: dict[int, Taken] = {}
        self.batcher = session.model.batcher
        if self.batcher is not None:
            self.batcher.on_end, self.batcher.pause = self._batched_ended, session.turns.yield_turn
        self.busy_s = 0.0
        self.log = logger("rank").bind(rank=session.mesh.rank)
        self._since = time.perf_counter()
        self.outcomes = Outcomes(session, channel, lambda: self.busy_s + time.perf_counter() - self._since, self.log)
        self._can_cancel = session.spec.of_server or session.spec.can_cancel

    def admit(self, active: int) -> Program | None:
        """At the beginning of a round: act on the commands that take effect now; return a program to add."""
        has_room = self.batcher is not None or active < self.session.spec.max_in_flight
        if self._listens(has_room):
            if not self.counts.ahead:
                self._read()
            for _ in range(self.counts.take()):
                self._act(self._next_command())
        program = self._next_program(has_room)
        if program is None and active == 0:
            self.busy_s += time.perf_counter() - self._since
            readable(self.channel, None)
            self._since = time.perf_counter()
        if self.counts.ahead:
            self._read()
        if program is not None and active == 0:
            reset_peak()
        return program

    def _next_program(self, has_room: bool) -> Program | None:
        if self.batcher is not None:
            return self.batcher.program()
        if not self.waiting or not has_room:
            return None
        taken = self.waiting.popleft()
        program = self.session.program(taken.request, self._progress(taken.key))
        self.running[program] = replace(taken, begun=time.perf_counter())
        return program

    def finish(self, program: Program) -> None:
        """Report the outcome of a program, of each request in it. One that failed must have failed on all ranks: they
        compare the outcome, or wait."""
        if self.batcher is not None:
            for key in sorted(self.batcher.ended(program)):
                assert program.error is not None
                self.outcomes.failed(self.in_batches.pop(key), program.error)
            return
        taken = self.running.pop(program)
        if isinstance(program.error, Interrupted):
            # Its remaining work in flight may take long and is not to count against later requests.
            self.session.turns.schedule.drain()
            self.outcomes.ended(taken, program.start, None, cancelled=True)
        elif program.error is not None:
            self.outcomes.failed(taken, program.error, program.start)
        else:
            self.outcomes.ended(taken, program.start, program.value)

    def _batched_ended(self, key: int, result: Any) -> None:
        """Report the end of a request of a batch. Its tokens are compared between ranks."""
        taken = self.in_batches.pop(key)
        seconds = time.perf_counter() - taken.begun
        self.outcomes.ended(taken, short_hash(repr(result).encode()).hex(), (result, seconds, []))

    def report(self, error: Exception) -> None:
        """Before an error ends this rank: name the request that ran out of memory, if one did."""
        program = self.session.turns.last
        if is_out_of_memory(error) and program is not None and program in self.running:
            taken = self.running[program]
            self.channel.send(OutOfMemory(taken.key, self.session.model.error_text(taken.request, error)))

    def current_request(self) -> dict[str, str]:
        """Return the id of the request whose turn it is, for the log."""
        taken = self.running.get(self.session.turns.current)
        return {"request_id": taken.request_id} if taken is not None else {}

    def _listens(self, has_room: bool) -> bool:
        """Return whether commands take effect in this round. If nothing can be cancelled, they do only if another
        request could begin: the exchange would cost time in each of the many rounds of a step."""
        return self.counts.ahead or self._can_cancel or (has_room and not self.waiting)

    def _read(self) -> None:
        """On the first rank: let the received commands take effect from the next `take` on."""
        if self.session.leads:
            while readable(self.channel, 0.0):
                self.commands.append(self.channel.recv())
            self.counts.give(len(self.commands))

    def _next_command(self) -> Any:
        if self.commands:
            return self.commands.popleft()
        return self.channel.recv()

    def _act(self, command: Any) -> None:
        if isinstance(command, Begin):
            try:
                self._take_in(Taken(command.key, command.load(), command.request_id))
            except InputError as error:
                self.channel.send(RequestFinished(key=command.key, start=None, error=str(error), refused=True))
            return
        assert isinstance(command, Cancel)
        if self.batcher is not None and self.batcher.cancel(command.key):
            self.outcomes.ended(self.in_batches.pop(command.key), None, None, cancelled=True)
        for taken in list(self.waiting):
            if taken.key == command.key:
                self.waiting.remove(taken)
                self.channel.send(RequestFinished(key=taken.key, start=None, cancelled=True))
        for program, taken in self.running.items():
            if taken.key == command.key:
                program.interrupted = True

    def _take_in(self, taken: Taken) -> None:
        if self.batcher is None:
            self.waiting.append(taken)
            return
        self.in_batches[taken.key] = replace(taken, begun=time.perf_counter())
        self.batcher.add(taken.key, taken.request, functools.partial(self._send_progress, taken.key))

    def _send_progress(self, key: int, step: int, total: int, made: Any = None, logprobs: Any = None) -> None:
        if self.session.leads:
            self.channel.send(Progress(key, step, total, made, logprobs))

    def _progress(self, key: int) -> Any:
        def report(_: int, step: int, total: int, made: Any = None) -> None:
            self._send_progress(key, step, total, made)
            if self._can_cancel:  # other requests wait for an answer, and this one may be cancelled
                # Where commands count a round later, a step in one turn (a first call) ends only in the round after.
                self.session.turns.yield_turn(2 if self.counts.ahead else 1)

        return report
