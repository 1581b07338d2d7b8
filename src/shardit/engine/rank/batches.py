"""Requests of a rank that share batches, as those of language models."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardit.core.runtime.digests import short_hash
from shardit.core.runtime.program import Program
from shardit.engine.process.messages import BatchStep, CacheUse, Progress
from shardit.engine.rank.outcomes import Outcomes, ReceivedRequest

if TYPE_CHECKING:
    from shardit.engine.tasks.task import OnProgress, RequestBatcher


REPORT_INTERVAL_S = 0.5
"""Shortest time between two reports of the use of caches, in seconds."""


class BatchPrograms:
    """The requests of a batcher; a program runs a batch. The same interface as `Programs`."""

    def __init__(self, session: Any, outcomes: Outcomes, batcher: RequestBatcher):
        self.outcomes, self.batcher = outcomes, batcher
        self._open: dict[int, ReceivedRequest] = {}
        self._step: list[Progress] = []
        batcher.on_end, batcher.on_step, batcher.pause = self._ended, self._end_step, session.loop.yield_turn
        self._leads = session.leads
        self._reports = session.leads and session.spec.of_server
        self._reported: tuple[int, int | None, int, int] = (0, None, 0, 0)
        self._reported_at = 0.0

    def could_begin(self, active: int) -> bool:
        """Return whether another request could begin: always, as it joins a batch."""
        return True

    def add(self, received: ReceivedRequest) -> None:
        """Queue a request."""
        self._open[received.key] = replace(received, begun=time.perf_counter())
        self.batcher.add(received.key, received.request, functools.partial(self._progress, received.key))

    def cancel(self, key: int) -> None:
        """End a request; it leaves its batch before the next step."""
        if self.batcher.cancel(key):
            self.outcomes.ended(self._open.pop(key), None, None, cancelled=True)

    def next(self, active: int) -> Program | None:
        """Return the program of a new batch, if a request needs one."""
        if self._reports and (not self._open or time.perf_counter() - self._reported_at >= REPORT_INTERVAL_S):
            self._report_use()
        return self.batcher.program()

    def _report_use(self) -> None:
        use, self._reported_at = self.batcher.cache_use, time.perf_counter()
        if use != self._reported:
            self.outcomes.channel.send(CacheUse(*use[:2], use[2] - self._reported[2], use[3] - self._reported[3]))
            self._reported = use

    def finish(self, program: Program) -> None:
        """Report the requests that have failed with a program."""
        for key in sorted(self.batcher.ended(program)):
            assert program.error is not None
            self.outcomes.failed(self._open.pop(key), program.error)

    def of_program(self, program: Program | None) -> ReceivedRequest | None:
        """Return the request that a program runs, None if it runs several."""
        keys = set() if program is None else self.batcher.suspects(program)
        return self._open.get(keys.pop()) if len(keys) == 1 else None

    def _progress(self, key: int, step: int, total: int, made: Any, logprobs: Any) -> None:
        self._step.append(Progress(key, step, total, made, logprobs))

    def _end_step(self) -> None:
        """Report the progress of all requests in one step, from the first rank."""
        step, self._step = tuple(self._step), []
        if step and self._leads:
            self.outcomes.channel.send(step[0] if len(step) == 1 else BatchStep(step))

    def _ended(self, key: int, result: Any) -> None:
        """Report the end of a request. Its result is compared between ranks."""
        received = self._open.pop(key)
        seconds = time.perf_counter() - received.begun
        self.outcomes.ended(received, short_hash(repr(result).encode()).hex(), (result, seconds, []))


def run_batches(session: Any, batcher: RequestBatcher, requests: list[Any], on_progress: OnProgress) -> dict[int, Any]:
    """Run requests that all ranks have, without a supervising process; see `Session.generate`."""
    outputs: dict[int, Any] = {}

    def end(position: int, result: Any, error: str | None = None) -> None:
        value = None if error is not None else (result, 0.0, [])
        outputs[position] = session.model.collect(requests[position], value, error)

    def add(position: int) -> None:
        def report(step: int, total: int, made: Any, logprobs: Any) -> None:
            on_progress(position, step, total, made)

        batcher.add(position, requests[position], report)

    def enter(active: int) -> Program | None:
        return batcher.program()

    batcher.on_end, batcher.pause = end, session.loop.yield_turn
    for position in range(session.mesh.coords["dp"], len(requests), session.mesh.sizes["dp"]):
        add(position)
    for program in session.loop.rounds(enter, lambda active: active > 0 or batcher.is_open):
        for position in batcher.ended(program):
            assert program.error is not None
            session.agree((position, type(program.error).__name__), f"here: {program.error!r}")
            end(position, None, session.model.error_text(requests[position], program.error))
    session.agree(short_hash(repr(sorted(outputs.items())).encode()), "the texts")
    if session.runtime is not None:
        session.runtime.flush()
    return outputs if session.leads else {}
