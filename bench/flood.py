"""Clients that ask for /health as fast as they can: a program of its own for each."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CLIENTS = 4


@contextlib.contextmanager
def flood(port: int) -> Iterator[None]:
    """Clients that ask meanwhile. They take only what processors have left (Linux: the idle class, in sessions of their
    own), as clients on other machines would take nothing."""
    command = [sys.executable, "-m", "bench.flood", str(port)]
    clients = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) for _ in range(CLIENTS)
    ]
    try:
        for client in clients:
            assert client.stdout is not None
            if not client.stdout.readline():
                raise RuntimeError("a client could not ask")
        yield
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def main(port: int, parent: int) -> None:
    """Ask until the process `parent` is gone, or this one is killed."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or without autogroups
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        Path("/proc/self/autogroup").write_text("19")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    _ask(connection)
    print("asks", flush=True)
    while os.getppid() == parent:
        _ask(connection)


def _ask(connection: http.client.HTTPConnection) -> None:
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise RuntimeError(f"/health: {answer.status}")


if __name__ == "__main__":
    main(int(sys.argv[1]), os.getppid())
