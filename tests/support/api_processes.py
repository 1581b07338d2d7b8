"""API processes for tests, most of them forked from one that has made their imports, which takes a second."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from typing import IO

from shardit.engine.process.process import command
from shardit.server.process.api_process import API

_WAITING = """
import gc, json, os, signal, socket, sys, traceback
gc.disable()  # as the supervisor starts it
from shardit.server.http.main import main

sent = socket.socket(fileno=int(sys.argv[1]))

def serve(environment, control, listener, log):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 2)
    os.close(log)
    code = 1
    try:
        main(control, listener)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

def watch(environment, control, listener, log, report):
    # The parent of the API process: it reports process id and exit code.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sent.close()
    pid = os.fork()
    if pid == 0:
        os.close(report)
        serve(environment, control, listener, log)
    for fd in (control, listener, log):
        os.close(fd)
    os.write(report, b"%d\\n" % pid)
    os.write(report, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that none stays a zombie
for line in sys.stdin:
    fds = socket.recv_fds(sent, 1, 4)[1]
    if os.fork() == 0:
        watch(json.loads(line), *fds)
    for fd in fds:
        os.close(fd)
"""


class ForkedProcess:
    """A process that is no child of this one, with the methods of `subprocess.Popen`. `report` is a file descriptor
    with two lines: process id and exit code."""

    def __init__(self, report: int):
        self._report = os.fdopen(report, "rb", buffering=0)
        self.pid = int(self._report.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._look(0)

    def wait(self, timeout: float) -> int:
        """Wait for the end; return the exit code. Raises subprocess.TimeoutExpired."""
        if (code := self._look(timeout)) is None:
            raise subprocess.TimeoutExpired(f"API process {self.pid}", timeout)
        return code

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _look(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            with self._report:
                self.returncode = int(self._report.readline() or -signal.SIGKILL)
        return self.returncode


@functools.cache
def _waiting() -> tuple[subprocess.Popen[str], socket.socket]:
    """Start the process that forks; it ends when this one is gone."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _WAITING, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return process, ours


def forked_api_process(control: socket.socket, listener: socket.socket, log: IO[bytes]) -> ForkedProcess:
    """Fork an API process with its end of the channel, the socket where it listens, and the file of its log. It has
    the environment of this process."""
    process, ours = _waiting()
    report, its_report = os.pipe()
    assert process.stdin is not None
    process.stdin.write(json.dumps(dict(os.environ)) + "\n")
    process.stdin.flush()
    socket.send_fds(ours, [b"x"], [control.fileno(), listener.fileno(), log.fileno(), its_report])
    os.close(its_report)
    return ForkedProcess(report)


def new_api_process(control: socket.socket, listener: socket.socket, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start an API process with an interpreter of its own, as the supervisor does."""
    fds = [control.fileno(), listener.fileno()]
    return subprocess.Popen(command(API, *fds, no_gc=True), pass_fds=fds, stderr=log, start_new_session=True)
