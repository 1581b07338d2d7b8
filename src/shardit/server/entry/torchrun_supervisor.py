"""The supervisor's process under torchrun, a child of the agent of rank 0."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading

from shardit.engine.nodes.rank_port import RankPort
from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.process import die_with_parent
from shardit.errors import InputError
from shardit.server.placement.torchrun import RELEASE_TIMEOUT_S, Supervise, TorchrunPlacement


def main(control_fd: int, listener_fd: int, agent: int) -> int:
    """Run the supervisor's process under torchrun; returns its exit code."""
    from shardit.server.entry.serve import serve

    die_with_parent(signal.SIGKILL)
    if os.getppid() != agent:
        return 1
    control = Channel(socket.socket(fileno=control_fd))
    try:
        start: Supervise = control.recv()
    except Closed:
        return 1
    places = [(rank, role) for rank in range(start.world_size) for role in ("rank", "agent")]
    port = RankPort(socket.socket(fileno=listener_fd), places, start.endpoint.token)
    placement = TorchrunPlacement(port, start.world_size)
    threading.Thread(target=_exit_on_command, args=(control, placement), daemon=True).start()
    try:
        return serve(start.options, placement, RELEASE_TIMEOUT_S if start.restarts else 0.0)
    except InputError as error:
        placement.stop(2)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2


def _exit_on_command(control: Channel, placement: TorchrunPlacement) -> None:
    """Stop on the agent's message; if the agent has exited, at once: unfinished work is done again later."""
    with contextlib.suppress(Closed, OSError):
        while True:
            placement.exit_agents(control.recv().code)
            os.kill(os.getpid(), signal.SIGTERM)
    os._exit(1)
