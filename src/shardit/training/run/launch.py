"""Starts the ranks of a run on this machine and waits for them, or makes this process one that torchrun started."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shardit.engine.joined_ranks import check_world_size, errors_with_rank
from shardit.engine.process.channel import send_all
from shardit.engine.process.exit_code import INTERRUPTED
from shardit.engine.process.failure import Failure, Timeouts
from shardit.engine.process.loop import Loop
from shardit.engine.process.placement import LocalPlacement
from shardit.engine.process.rank_group import RankGroup
from shardit.training.run.messages import Began, Ended, Stop, TrainSpec

POLL_INTERVAL_S = 0.2
STOP_GRACE_S = 5.0
"""Grace period of ranks at the end of a run, or after a request to end."""

SIGNAL_WINDOW_S = 2.0
"""Time in which several signals are one."""


def run_here(spec: TrainSpec) -> bool:
    """Train on ranks of this machine; return whether the run was stopped early. Raises InputError, RankError."""
    return LocalRun(spec).run()


class LocalRun:
    """The ranks of a run, seen from the user's process."""

    def __init__(self, spec: TrainSpec, timeouts: Timeouts | None = None):
        self._failure: Failure | None = None
        self._began, self._asked = False, 0
        self._ended: dict[int, Ended] = {}
        self._loop = Loop(lambda: None, POLL_INTERVAL_S)
        self.placement = LocalPlacement(spec.timeout_s)
        self.group = RankGroup(
            spec,
            self.placement,
            self._loop,
            on_up=lambda _: None,
            on_down=self._on_down,
            on_message=self._on_message,
            timeouts=timeouts or Timeouts(),
        )

    def run(self) -> bool:
        """Start the ranks and wait until all have ended."""
        try:
            with handled(lambda _: self._loop.call(self._stop)):
                self.group.bring_up()
                self._loop.run(lambda: self._failure is not None or len(self._ended) == self.group.size)
            if self._failure is not None:
                raise self._failure.error()
            self.group.disconnect()
            self.placement.kill(STOP_GRACE_S)
            return self._ended[0].early
        finally:
            self.group.stop()

    def _on_message(self, rank: int, message: Any) -> None:
        if isinstance(message, Began):
            self._began = True
        elif isinstance(message, Ended):
            self._ended[rank] = message

    def _on_down(self, failure: Failure) -> None:
        self._failure = failure

    def _stop(self) -> None:
        """Ask the ranks to end; at once if they have not begun, or were asked before."""
        self._asked += 1
        if self._asked > 1 or not self._began:
            raise KeyboardInterrupt
        print_line("stopping after the present step, with a checkpoint; press Ctrl-C again to stop at once")
        send_all(self.group.pipes(range(self.group.size)), Stop())


def run_joined(spec: TrainSpec) -> bool:
    """Train as one of the ranks that torchrun has started; return whether the run was stopped early."""
    from shardit.engine.rank.worker import open_session

    check_world_size(spec.config.world_size)
    rank, asked = int(os.environ["RANK"]), StopRequest()
    with handled(asked.signal), errors_with_rank(rank):
        session = open_session(spec, rank=rank, world_size=spec.config.world_size, init_method="env://")
        early = session.run(asked.is_set, asked.begin)
        session.close()
    return early


class StopRequest:
    """Whether a rank of torchrun was asked to end after the present step."""

    def __init__(self) -> None:
        self._began, self._since = False, None

    def begin(self) -> None:
        """From now on there is a step to end after."""
        self._began = True

    def is_set(self) -> bool:
        """Return whether the rank was asked."""
        return self._since is not None

    def signal(self, number: int) -> None:
        """Take a signal. Ctrl-C arrives from the terminal and from torchrun, at nearly the same time."""
        now = time.monotonic()
        if not self._began or (self._since is not None and now - self._since > SIGNAL_WINDOW_S):
            raise KeyboardInterrupt
        if self._since is None and number == signal.SIGTERM:
            # torchrun sends it also if another rank has died, for which this one would wait.
            end = threading.Timer(STOP_GRACE_S, os._exit, (INTERRUPTED,))
            end.daemon = True
            end.start()
        self._since = self._since or now


def print_line(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def handled(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` with the number of the signal on SIGINT and SIGTERM meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda received, _: stop(received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
