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

import time
from collections import deque
from typing import Any

from shardit.core.runtime.program import Program, is_out_of_memory
from shardit.engine.process.channel import Channel
from shardit.engine.process.memory import reset_peak
from shardit.engine.process.messages import Begin, Cancel, OutOfMemory
from shardit.engine.rank.batches import BatchPrograms
from shardit.engine.rank.command_counts import Counts, readable
from shardit.engine.rank.outcomes import Outcomes, ReceivedRequest
from shardit.engine.rank.programs import Programs
from shardit.errors import InputError
from shardit.logs import logger


class ServingWorker:
    """The received commands, the requests, and the number of commands for each round.

    requests: those of this rank, as programs of their own or in batches.
    """

    def __init__(self, session: Any, channel: Channel):
        self.session = session
        self.channel = channel
        self.counts = Counts(session)
        self.commands: deque[Any] = deque()
        self.busy_s = 0.0
        self.log = logger("rank").bind(rank=session.mesh.rank)
        self._since = time.perf_counter()
        self._can_cancel = session.spec.of_server or session.spec.can_cancel
        self.outcomes = Outcomes(session, channel, lambda: self.busy_s + time.perf_counter() - self._since, self.log)
        self.requests: Programs | BatchPrograms
        if session.model.batcher is None:
            ahead, can_cancel = self.counts.ahead, self._can_cancel
            self.requests = Programs(session, self.outcomes, ahead=ahead, can_cancel=can_cancel)
        else:
            self.requests = BatchPrograms(session, self.outcomes, session.model.batcher)

    def admit(self, active: int) -> Program | None:
        """At the beginning of a round: act on the commands that take effect now; return a program to add."""
        if self._takes_commands(active):
            if not self.counts.ahead:
                self._read()
            for _ in range(self.counts.next()):
                self._execute(self._next_command())
        program = self.requests.next(active)
        if program is None and active == 0:
            self.busy_s += time.perf_counter() - self._since
            readable(self.channel, None)
            self._since = time.perf_counter()
        if self.counts.ahead:
            self._read()
        if program is not None and active == 0:
            reset_peak()
        return program

    def finish(self, program: Program) -> None:
        """Report the outcome of a program. One that failed must have failed on all ranks: they compare the outcome, or
        wait."""
        self.requests.finish(program)

    def report(self, error: Exception) -> None:
        """Before an error ends this rank: name the request that ran out of memory, if it was one alone."""
        received = self.requests.of_program(self.session.loop.last)
        if is_out_of_memory(error) and received is not None:
            self.channel.send(OutOfMemory(received.key, self.session.model.error_text(received.request, error)))

    def current_request(self) -> dict[str, str]:
        """Return the id of the request whose turn it is, for the log."""
        received = self.requests.of_program(self.session.loop.current)
        return {"request_id": received.request_id} if received is not None else {}

    def _takes_commands(self, active: int) -> bool:
        """Return whether commands take effect in this round. If nothing can be cancelled, they do only if another
        request could begin: the exchange would cost time in each of the many rounds of a step."""
        return self.counts.ahead or self._can_cancel or self.requests.could_begin(active)

    def _read(self) -> None:
        """On the first rank: let the received commands take effect from the next count on."""
        if self.session.leads:
            while readable(self.channel, 0.0):
                self.commands.append(self.channel.recv())
            self.counts.send(len(self.commands))

    def _next_command(self) -> Any:
        if self.commands:
            return self.commands.popleft()
        return self.channel.recv()

    def _execute(self, command: Any) -> None:
        if isinstance(command, Cancel):
            self.requests.cancel(command.key)
            return
        assert isinstance(command, Begin)
        try:
            request = command.load()
        except InputError as error:
            self.outcomes.rejected(command.key, str(error))
            return
        self.requests.add(ReceivedRequest(command.key, request, command.request_id))
