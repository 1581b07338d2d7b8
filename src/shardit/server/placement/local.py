"""Ranks on this machine, forked by the fork server; and what every placement of ranks offers."""

from __future__ import annotations

import contextlib
import threading
from typing import Protocol

from shardit.engine.process.channel import Channel
from shardit.engine.process.fork_client import STOP_WAIT_S, ForkServer
from shardit.engine.process.messages import Exited, Gone, Kill, SessionSpec
from shardit.engine.process.process import describe_exit


class Placement(Protocol):
    """Where ranks live."""

    def start(self, spec: SessionSpec) -> list[Channel]:
        """Start all ranks, after the end of earlier ones; a channel to each. Raises InputError, RankError."""
        ...

    def kill(self) -> dict[int, str]:
        """End all ranks; how those ended that were gone already."""
        ...

    def stop(self, code: int = 0) -> None:
        """End everything, for good. code: 0 where that was asked for, 2 after a mistake of the user, else 1."""
        ...

    def stacks(self) -> dict[int, str]:
        """Where each rank is; {} where that cannot be told."""
        ...


class LocalPlacement:
    """Ranks on this machine, forked by a fork server."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._fork_server: ForkServer | None = None
        self._stopped = False
        self._talking = threading.Lock()  # one question to the fork server at a time

    def start(self, spec: SessionSpec) -> list[Channel]:
        """See `Placement`."""
        with self._talking:
            return self._start(spec)

    def _start(self, spec: SessionSpec) -> list[Channel]:
        if self._fork_server is None or not self._fork_server.alive:
            if self._fork_server is not None:
                self._fork_server.stop()  # what it has left behind
            self._fork_server = ForkServer(self._timeout_s)
            if self._stopped:
                self._fork_server.stop()
            self._fork_server.check(spec)
        return self._fork_server.start(spec, spec.config.world_size)

    def kill(self) -> dict[int, str]:
        """See `Placement`."""
        with self._talking:
            return self._kill()

    def _kill(self) -> dict[int, str]:
        if self._fork_server is None or not self._fork_server.alive:
            return {}
        ends: dict[int, str] = {}
        control = self._fork_server.control
        try:
            control.socket.settimeout(STOP_WAIT_S)
            control.send(Kill())
            while not isinstance(message := control.recv(), Gone):
                if isinstance(message, Exited):
                    ends[message.rank] = describe_exit(message.code)
            control.socket.settimeout(self._timeout_s)
        except Exception:  # a message that was cut off by an earlier timeout may read as anything
            self._fork_server.stop()
        return ends

    def stop(self, code: int = 0) -> None:
        """See `Placement`."""
        self._stopped = True
        if self._fork_server is not None:
            self._fork_server.stop()

    def stacks(self) -> dict[int, str]:
        """See `Placement`."""
        with self._talking, contextlib.suppress(OSError, EOFError):
            if self._fork_server is not None and self._fork_server.alive:
                self._fork_server.control.socket.settimeout(STOP_WAIT_S)
                return self._fork_server.stacks()
        return {}
