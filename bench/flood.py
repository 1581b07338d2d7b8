"""What ranks lose where clients ask for all that the HTTP interface can give: a program of its own per client."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CLIENTS = 4


@contextlib.contextmanager
def flood(port: int, path: str = "/health") -> Iterator[None]:
    """Clients that ask again and again meanwhile. They take only what processors have left (Linux: the idle class), as
    clients on other machines would take nothing."""
    command = [sys.executable, "-m", "bench.flood", str(port), path]
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


def ask(port: int, path: str, over: float) -> None:
    """Ask until the monotonic time `over`."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or without autogroups
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        Path("/proc/self/autogroup").write_text("19")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    first = True
    while time.monotonic() < over:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status}")
        if first:
            print("asks", flush=True)
            first = False


if __name__ == "__main__":
    ask(int(sys.argv[1]), sys.argv[2], time.monotonic() + 600)
