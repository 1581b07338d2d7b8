"""The supervisor's side of the API process: starts it at once, restarts it when it exits or hangs, and keeps the
socket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from shardit.engine.process.channel import Channel, Pipe
from shardit.engine.process.loop import Loop
from shardit.engine.process.process import command, describe_exit
from shardit.server.messages import Ping, Pong, StepDone
from shardit.server.options import ServeOptions
from shardit.server.process.heartbeat import Heartbeat

API = "shardit.server.http.start"
"""The module of the API process."""
UNABLE = 77
"""Exit code of an API process that cannot be imported."""
MAX_BACKLOG = 1000
"""Number of unread messages above which an API process gets no more steps."""
STABLE_AFTER_S = 5.0
"""An API process that lived for so many seconds is restarted at once when it exits."""
MAX_DELAY_S, STOP_TIMEOUT_S = 10.0, 2.0


@dataclass(frozen=True)
class StartedApiProcess:
    """An API process that runs its imports, and then waits for its options."""

    process: subprocess.Popen[bytes]
    channel: Channel


def start(listener: socket.socket) -> StartedApiProcess:
    """Start an API process; returns at once."""
    ours, theirs = socket.socketpair()
    fds = [theirs.fileno(), listener.fileno()]
    with theirs:
        process = subprocess.Popen(
            command(API, *fds, no_gc=True),
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C is for the supervisor, which then decides
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return StartedApiProcess(process, Channel(ours))


@contextlib.contextmanager
def started(listener: socket.socket) -> Iterator[StartedApiProcess]:
    """Yield a started API process; it is stopped on exit."""
    api = start(listener)
    try:
        yield api
    finally:
        api.process.kill()
        api.process.wait()


class ApiProcess:
    """A running API process, or one that will be started again.

    on_message(message) is called in the loop with its messages, on_start() after a new one has been started.
    """

    def __init__(
        self,
        options: ServeOptions,
        first: StartedApiProcess,
        listener: socket.socket,
        loop: Loop,
        *,
        on_message: Callable[[Any], None],
        on_start: Callable[[], None],
        log: Any,
    ):
        self._options, self._first, self._listener = options, first, listener
        self._loop, self._log = loop, log
        self._on_message, self._on_start = on_message, on_start
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Pipe | None = None
        self._heartbeat: Heartbeat | None = None
        self._started_at = 0.0
        self._delay_s = 0.0
        self._retry_at = 0.0
        self._kill_at = 0.0
        self.unable = False
        """Whether the first process could not be imported: the user must change something."""

    def start(self) -> None:
        """Send the process its options; returns at once."""
        self._begin(self._first)

    def _begin(self, api: StartedApiProcess) -> None:
        self._process = api.process
        heartbeat = self._heartbeat = Heartbeat(lambda: pipe.send(Ping()))
        pipe = self._pipe = Pipe(api.channel, lambda message: self._received(heartbeat, message), lambda: None)
        pipe.send(self._options)
        self._started_at = time.monotonic()
        self._on_start()

    @property
    def pid(self) -> int | None:
        """The process id of the running process."""
        return self._process.pid if self._process is not None else None

    def send(self, message: Any) -> None:
        """Send it a message; steps are left out while it does not read."""
        if self._pipe is not None and not (isinstance(message, StepDone) and self._pipe.backlog > MAX_BACKLOG):
            self._pipe.send(message)

    def check(self) -> None:
        """Start it again if it has exited, kill it if it hangs. One that exits repeatedly is started after a growing
        pause."""
        now = time.monotonic()
        if self._process is not None and self._heartbeat is not None and self._heartbeat.hangs():
            self._log.error("api_process_hangs", reason="it has not answered for some time; it is ended")
            self._heartbeat = None
            self._process.kill()
        if self._process is not None and (code := self._process.poll()) is not None:
            self._delay_s = (
                0.0 if now - self._started_at > STABLE_AFTER_S else min(MAX_DELAY_S, 2 * self._delay_s + 0.25)
            )
            reason = describe_exit(code) if self._heartbeat is not None else "ended as it hung"
            self._log.warning("api_process_ended", reason=reason, retry_in_s=self._delay_s)
            self.unable = code == UNABLE and self._process is self._first.process
            self._process, self._retry_at = None, now + self._delay_s
            if self._pipe is not None:
                self._pipe.close()
        if self._process is None and now >= self._retry_at and not self.unable:
            try:
                self._begin(start(self._listener))
            except OSError as error:  # no memory, no process numbers
                self._retry_at = now + MAX_DELAY_S
                self._log.error("api_process_not_started", reason=str(error), retry_in_s=MAX_DELAY_S)

    def _received(self, heartbeat: Heartbeat, message: Any) -> None:
        # In the thread that reads: an answer counts even if the loop is busy.
        if isinstance(message, Pong):
            heartbeat.answered()
        else:
            self._loop.call(self._on_message, message)

    def terminate(self) -> None:
        """Ask it to finish its answers and exit."""
        if self._process is not None:
            self._kill_at = time.monotonic() + STOP_TIMEOUT_S
            self._process.terminate()

    def stop(self) -> None:
        """Wait until it has exited, after `terminate`; kill it some seconds after that."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, self._kill_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
