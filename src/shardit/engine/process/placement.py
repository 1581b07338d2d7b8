"""The interface of a placement of ranks, and ranks on this machine, forked by the fork server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Protocol

from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.failure import Failure
from shardit.engine.process.fork_client import STOP_TIMEOUT_S, ForkServerClient
from shardit.engine.process.messages import SessionSpec
from shardit.errors import RankError

Report = Callable[[Failure], None]
"""Called in any thread with the failure of a process noticed by a placement."""


class Placement(Protocol):
    """Starts and stops ranks on some machines."""

    def start(self, spec: SessionSpec, report: Report) -> list[Channel]:
        """Start all ranks, after the end of earlier ones; returns a channel to each. Raises InputError, RankError."""
        ...

    def kill(self, grace_s: float = 0.0) -> None:
        """Stop all ranks. grace_s: time for ranks on this machine to exit by themselves, in seconds."""
        ...

    def stop(self, code: int = 0) -> None:
        """Stop everything permanently. code: 0 on request, 2 after a mistake of the user, else 1."""
        ...

    def stacks(self) -> dict[int, str]:
        """Return the stack of each rank; {} if they cannot be read."""
        ...


class LocalPlacement:
    """Ranks on this machine, forked by a fork server."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self.fork_server: ForkServerClient | None = None
        self._stopped = False
        self._report: Report = lambda _: None
        self._starting = threading.Lock()

    def start(self, spec: SessionSpec, report: Report) -> list[Channel]:
        """See `Placement`."""
        with self._starting:
            self._report = report
            try:
                return self._start(spec)
            except TimeoutError:
                state = f"did not answer in time: raise timeout_s (--timeout), which is {self._timeout_s:g} s"
            except Closed:
                state = self.fork_server.exit_reason() if self.fork_server else "has ended"
            raise RankError(-1, f"the process that starts ranks {state}")

    def _start(self, spec: SessionSpec) -> list[Channel]:
        if self.fork_server is None or not self.fork_server.alive:
            if self.fork_server is not None:
                self.fork_server.stop()  # removes its temporary files
            self.fork_server = ForkServerClient(self._timeout_s, self._exited, self._ended)
            if self._stopped:
                self.fork_server.stop()
            self.fork_server.check(spec)
        return self.fork_server.start(spec, spec.config.world_size)

    def _exited(self, rank: int, code: int) -> None:
        self._report(Failure.of_exit(rank, code))

    def _ended(self, how: str) -> None:
        self._report(Failure(f"the process that starts ranks {how}"))

    def kill(self, grace_s: float = 0.0) -> None:
        """See `Placement`."""
        if self.fork_server is not None and self.fork_server.alive:
            self.fork_server.kill(grace_s)

    def stop(self, code: int = 0) -> None:
        """See `Placement`."""
        self._stopped = True
        if self.fork_server is not None:
            self.fork_server.stop()

    def stacks(self) -> dict[int, str]:
        """See `Placement`."""
        with contextlib.suppress(OSError, EOFError):
            if self.fork_server is not None and self.fork_server.alive:
                return self.fork_server.stacks(STOP_TIMEOUT_S)
        return {}
