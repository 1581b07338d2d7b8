"""Ranks started by torchrun: the supervisor as the child of rank 0's agent, and its messages to all agents."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait

from shardit.engine.nodes.handshake import Endpoint
from shardit.engine.nodes.rank_port import RankPort, join_all
from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.messages import SessionSpec
from shardit.engine.process.placement import Report
from shardit.errors import RankError
from shardit.server.options import ServeOptions

RESTART = 75
"""Exit code of agents for a restart of all ranks; torchrun restarts on any code but 0."""
ARRIVAL_TIMEOUT_S = 900.0
"""Time limit for all ranks to arrive, in seconds. They arrive before they load the model."""
RESTART_TIMEOUT_S = 60.0
"""Seconds that a supervisor waits to be stopped when ranks are restarted."""
RELEASE_TIMEOUT_S = 20.0
"""Seconds that a supervisor waits for its predecessor to release the data folder and the port."""


@dataclass(frozen=True)
class Supervise:
    """The first message from the agent of rank 0 to the supervisor. restarts: number of torchrun's restarts."""

    options: ServeOptions
    endpoint: Endpoint
    world_size: int
    restarts: int


@dataclass(frozen=True)
class Exit:
    """From the supervisor to agents: exit with this code; from the agent of rank 0: make all agents exit."""

    code: int


class TorchrunPlacement:
    """See `Placement`. Ranks are started once: to restart them, all processes end and torchrun starts others."""

    def __init__(self, port: RankPort, world_size: int):
        self._port, self._size = port, world_size
        self._control_channels: list[Channel] = []
        self._exit_sent = threading.Lock()
        self._started = False
        self._over = threading.Event()

    def start(self, spec: SessionSpec, report: Report) -> list[Channel]:
        """See `Placement`. Processes on other machines are not monitored: only a closed connection is noticed."""
        if self._started:
            self._over.wait(RESTART_TIMEOUT_S)
            raise RankError(-1, "torchrun has not restarted the ranks")
        self._started = True
        arrived = self._port.collect(ARRIVAL_TIMEOUT_S)
        self._control_channels = [arrived[rank, "agent"].channel for rank in range(self._size)]
        return join_all([arrived[rank, "rank"] for rank in range(self._size)], spec)

    def kill(self, grace_s: float = 0.0) -> None:
        """See `Placement`. This ends the supervisor too: its successor continues with its jobs."""
        if self._started:
            self.exit_agents(RESTART)
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self, code: int = 0) -> None:
        """See `Placement`."""
        self._over.set()
        self.exit_agents(code)
        self._port.close()

    def stacks(self) -> dict[int, str]:
        """See `Placement`."""
        return {}

    def exit_agents(self, code: int) -> None:
        """Make all agents exit with `code`; the first call counts. 0 becomes RESTART if an agent is gone already:
        torchrun, which noticed, is about to restart all and has therefore sent a signal to end."""
        if not self._exit_sent.acquire(blocking=False):
            return
        if (
            code == 0
            and self._control_channels
            and wait([control_channel.socket for control_channel in self._control_channels], 0)
        ):
            code = RESTART
        for control_channel in self._control_channels:
            with contextlib.suppress(Closed, OSError):
                control_channel.socket.settimeout(1.0)
                control_channel.send(Exit(code))
