"""The ranks that an `Omni` or an `LLM` starts: begins all requests of a call, and waits until they have finished."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardit.engine.process.channel import Packed, send_all
from shardit.engine.process.failure import Failure, Timeouts
from shardit.engine.process.hangs import HangDetector
from shardit.engine.process.in_flight import InFlight
from shardit.engine.process.loop import Loop
from shardit.engine.process.messages import (
    BatchStep,
    Begin,
    Cancel,
    InputRejected,
    Progress,
    RequestFailed,
    RequestFinished,
    SessionSpec,
)
from shardit.engine.process.placement import LocalPlacement, Placement
from shardit.engine.process.rank_group import RankGroup
from shardit.engine.tasks.task import OnProgress
from shardit.errors import InputError

if TYPE_CHECKING:
    from shardit.diffusion.output.output import Output
    from shardit.diffusion.request.model_info import ModelInfo

CLOSE_GRACE_S = 1.0
POLL_INTERVAL_S = 0.1


class StartedRanks:
    """Rank processes. They are stopped when one of them fails, and started again when needed.

    All decisions are made in the thread that calls `start` or `generate`.
    """

    def __init__(self, spec: SessionSpec, timeouts: Timeouts, placement: Placement | None = None):
        self.spec = spec
        self.info: ModelInfo | None = None
        self.owner = os.getpid()
        self.placement = placement or LocalPlacement(spec.timeout_s)
        self._lock = threading.RLock()
        self._loop = Loop(self._check, POLL_INTERVAL_S)
        self._group = RankGroup(
            spec,
            self.placement,
            self._loop,
            on_up=self._on_up,
            on_down=self._on_down,
            on_message=self._on_message,
            timeouts=timeouts,
        )
        self._ranks_per_replica = spec.config.world_size // spec.config.data_parallel_size
        self._in_flight: dict[int, InFlight] = {}
        self._hangs = HangDetector(self._group, self._in_flight.values, lambda _: self.spec.timeout_s, timeouts.probe_s)
        self._held: list[int] = []
        self._up = False
        self._failure: Failure | None = None
        self._closed = False
        self._on_step: Callable[[Progress], None] = lambda _: None
        self._keys = itertools.count(1)

    def start(self) -> None:
        """Start the ranks and wait until they have loaded the model."""
        with self._lock, self._ending_ranks_on_error():
            self._failure = None
            self._group.bring_up()
            self._run_until(lambda: self._up)

    def generate(self, build: Callable[[], list[Any]], on_progress: OnProgress) -> list[Output]:
        """Run the requests that `build` returns on all ranks."""
        if os.getpid() != self.owner:
            raise InputError("this Omni was made by another process; make one in the process that uses it")
        begins = [Begin(next(self._keys), _packed(request)) for request in build()]
        with self._lock:
            if not self._up:
                self.start()
            with self._ending_ranks_on_error():
                finished = self._run(begins, on_progress)
        rejections = [one.first.error for one in finished if one.first.rejected]
        if rejections:
            raise InputError(rejections[0])
        peaks = [
            max((one.finished[rank].peak_bytes for one in finished if rank in one.finished), default=held)
            for rank, held in enumerate(self._held)
        ]
        return [one.first.output and replace(one.first.output, peak_bytes=peaks) for one in finished]

    def cancel_all(self) -> None:
        """End the requests in flight at their next steps; called by `on_progress`, in the thread of `generate`."""
        for key, one in self._in_flight.items():
            send_all(self._group.pipes(one.ranks), Cancel(key))

    def close(self) -> None:
        """Stop all processes."""
        if os.getpid() != self.owner:
            return  # this is a fork of the process that made it
        if not self._lock.acquire(timeout=0.1):
            self._closed = True
            self.placement.stop()  # another thread is in `generate`, which then fails
            return
        try:
            if self._up:
                self._end_ranks(CLOSE_GRACE_S)
            self._group.stop()
        finally:
            self._lock.release()

    def _run(self, begins: list[Begin], on_progress: OnProgress) -> list[InFlight]:
        numbers = {begin.key: number for number, begin in enumerate(begins)}
        self._on_step = lambda one: on_progress(numbers[one.key], one.step, one.total, one.made)
        requests: list[InFlight] = []
        for number, begin in enumerate(begins):
            replica = number % self.spec.config.data_parallel_size
            ranks = range(replica * self._ranks_per_replica, (replica + 1) * self._ranks_per_replica)
            requests.append(InFlight(replica, ranks))
            self._in_flight[begin.key] = requests[-1]
            self._hangs.begins(replica)
            send_all(self._group.pipes(ranks), begin)
        self._run_until(lambda: not self._in_flight)
        return requests

    def _run_until(self, condition: Callable[[], bool]) -> None:
        """Run the loop until a condition holds. Raises InputError or RankError if the ranks fail before."""
        self._loop.run(lambda: condition() or self._failure is not None)
        if self._closed:
            raise InputError("close() was called while a call waited for its outputs")
        if self._failure is not None:
            raise self._failure.error()

    def _on_up(self, infos: list[ModelInfo]) -> None:
        self.info, self._up = infos[0], True
        self._held = [info.held_bytes for info in infos]  # the peak of a rank without a request
        self._hangs.reset()

    def _on_down(self, failure: Failure) -> None:
        self._failure = failure

    def _on_message(self, rank: int, message: Any) -> None:
        if isinstance(message, BatchStep):
            for progress in message.of:
                self._on_message(rank, progress)
            return
        one = self._in_flight.get(message.key)
        if one is None:
            return
        self._hangs.record_message(one.replica)
        if isinstance(message, Progress):
            self._on_step(message)
        elif isinstance(message, (RequestFailed, RequestFinished)):
            one.record(rank, message)
            if isinstance(message, RequestFinished) and message.rejected:
                self._loop.later(self._group.timeouts.own_s, self._rejected_alone, message)
            if (outcomes := one.difference()) is not None:
                self._group.fail(f"ranks disagree on the outcome of a request: {outcomes}")
            elif one.complete:
                del self._in_flight[message.key]

    def _rejected_alone(self, message: RequestFinished) -> None:
        """Fail the ranks: the others that run this request would wait forever for the rank that refused it."""
        if message.key in self._in_flight:
            self._failure = Failure.of_rejection(InputRejected(message.error or ""))

    def _check(self) -> None:
        since, timeout_s = self._group.loading_since, self.spec.timeout_s
        if since is not None and time.monotonic() - since > timeout_s and not self._group.failing:
            self._group.hang(f"no progress for {timeout_s:g} s", self._group.loading)
        self._hangs.check()

    @contextlib.contextmanager
    def _ending_ranks_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._end_ranks()
            raise

    def _end_ranks(self, grace_s: float = 0.0) -> None:
        self._up = False
        self._in_flight.clear()
        self._group.disconnect()
        self.placement.kill(grace_s)


def _packed(request: Any) -> Packed:
    try:
        return Packed.of(request)
    except Exception as error:
        raise InputError(f"a request holds an object that cannot be sent to the ranks: {error}") from error
