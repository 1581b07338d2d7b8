"""The client of the fork server: starts it, and requests the start and stop of ranks."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.messages import (
    Check,
    Checked,
    Dump,
    Exited,
    Failed,
    InputRejected,
    Kill,
    RanksStarted,
    RanksStopped,
    SessionSpec,
    Stacks,
    Start,
)
from shardit.engine.process.process import (
    OWN_GROUP,
    command,
    describe_exit,
    hold_standard_descriptors,
    inherited,
    threads_per_rank,
)
from shardit.errors import InputError, RankError

FORK_SERVER = "shardit.engine.rank.fork_server"
"""The module of the process that forks the ranks."""
STOP_TIMEOUT_S = 6.0
IMPORT_TIMEOUT_S = 120.0


class ForkServerClient:
    """A running fork server process. It leaves no process after `stop`, nor after the end of this process.

    on_exit(rank, code): a rank has exited. on_end(how): the fork server itself has exited. Both are called in the
    thread that reads its messages.
    """

    def __init__(
        self,
        timeout_s: float,
        on_exit: Callable[[int, int], None] = lambda *_: None,
        on_end: Callable[[str], None] = lambda _: None,
    ):
        if not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
            raise InputError("rank processes need fork, which this system does not have; use Linux or macOS")
        self.timeout_s = timeout_s
        self.pids: list[int] = []
        self.directory: str | None = None
        self._on_exit, self._on_end = on_exit, on_end
        self._checked = False
        self._asking = threading.Lock()  # one question at a time
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        hold_standard_descriptors()
        ours, theirs = socket.socketpair()
        self.control = Channel(ours)
        with theirs:
            self.process = subprocess.Popen(
                command(FORK_SERVER, theirs.fileno(), os.getpid(), no_gc=True),
                stdin=subprocess.DEVNULL,  # a script may be read from standard input
                stdout=inherited(1),
                stderr=inherited(2),
                pass_fds=[theirs.fileno()],
                env=fork_server_environment(),
                **OWN_GROUP,
            )
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def check(self, spec: SessionSpec) -> None:
        """Import the packages that ranks need; raise InputError for mistakes that can be found without ranks."""
        # The imports may take longer than a short timeout, which is meant for ranks that hang.
        answer = self._ask(Check(spec), max(self.timeout_s, IMPORT_TIMEOUT_S), Checked, InputRejected, Failed)
        self._checked = True
        if isinstance(answer, InputRejected):
            raise answer.error()
        if isinstance(answer, Failed):
            raise RankError(-1, f"the check before the start failed: {answer.reason}")

    def start(self, spec: SessionSpec, world_size: int) -> list[Channel]:
        """Fork the ranks; returns a channel to each."""
        pairs = [socket.socketpair() for _ in range(world_size)]
        message = Start(spec, world_size, threads_per_rank(world_size))
        try:
            started = self._ask(message, self.timeout_s, RanksStarted, fds=[theirs.fileno() for _, theirs in pairs])
        finally:
            for _, theirs in pairs:
                theirs.close()
        self.pids, self.directory = started.pids, started.directory
        return [Channel(ours) for ours, _ in pairs]

    def stacks(self, timeout_s: float) -> dict[int, str]:
        """Return the stack of each living rank."""
        return self._ask(Dump(), timeout_s, Stacks).by_rank

    def kill(self, grace_s: float = 0.0) -> None:
        """Stop the ranks; the fork server stays. If that fails, stop everything."""
        if not self._checked:
            self.stop()
            return
        try:
            self._ask(Kill(grace_s), STOP_TIMEOUT_S + grace_s, RanksStopped)
        except BaseException as error:
            self.stop()
            if not isinstance(error, Exception):
                raise

    def _ask(self, message: Any, timeout_s: float, *wanted: type, fds: Sequence[int] = ()) -> Any:
        """Send a message and wait for the answer. Raises Closed, TimeoutError."""
        with self._asking:
            try:
                self.control.send(message)
                if fds:
                    socket.send_fds(self.control.socket, [b"."], list(fds))
            except OSError as error:
                raise Closed(str(error)) from error
            deadline = time.monotonic() + timeout_s
            while True:
                try:
                    answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    raise TimeoutError("the fork server does not answer") from None
                if answer is _END:
                    self._answers.put(_END)  # for later callers
                    raise Closed("the fork server is gone")
                if isinstance(answer, wanted):  # another is the late answer to an abandoned question
                    return answer

    def _read(self) -> None:
        with contextlib.suppress(Closed, OSError):
            while True:
                message = self.control.recv()
                if isinstance(message, Exited):
                    self._on_exit(message.rank, message.code)
                else:
                    self._answers.put(message)
        self.control.close()
        self._answers.put(_END)
        self._on_end(self.exit_reason())

    def stop(self) -> None:
        """Stop the fork server, which stops the ranks; if it has to be killed, the kernel kills them (Linux)."""
        with contextlib.suppress(OSError):
            self.control.socket.shutdown(socket.SHUT_RDWR)
        if not self._checked:
            self.process.kill()  # it has no ranks yet, and during its imports it does not read the socket
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except BaseException as error:
            self.process.kill()
            self.process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            if self.directory is not None:
                shutil.rmtree(self.directory, ignore_errors=True)

    def exit_reason(self) -> str:
        """Describe the exit of a fork server that has closed its socket."""
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        return describe_exit(code)


_END = object()


def fork_server_environment() -> dict[str, str]:
    """Return the environment of a process that can be forked: one thread, and GPUs counted without a CUDA context."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it logs every optional package that is missing
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # left by a cluster's launcher, they would describe other ranks than ours
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback and any(name == loopback for _, name in socket.if_nameindex()):
        # All ranks are local. gloo would look up the host's name, which fails on many machines and opens ports.
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return environment
