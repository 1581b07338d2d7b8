"""The fork server: imports torch and diffusers once and forks rank processes, so that a rank starts at once.

It never touches an accelerator and runs no threaded operation: a fork copies neither a CUDA context nor threads. It
exits, and its ranks with it, when the user's process is gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path
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
from shardit.engine.process.process import die_with_parent
from shardit.errors import InputError
from shardit.loading.missing_packages import import_failure, missing_package

PRELOAD = ("torch.distributed", "diffusers.pipelines.pipeline_utils", "transformers.modeling_utils")
"""Imports of every rank. The session's module may have its own PRELOAD, and its check imports more."""
KILL_TIMEOUT_S = 5.0
STACK_DUMP_S = 0.5


def main(control_fd: int, parent: int) -> None:
    """Serve the user's process `parent` over the socket `control_fd` until it is gone."""
    # Imports can take seconds in which nothing reads the socket. Later the thread that started this process may end
    # while the process lives on, so the setting is undone after the check.
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        return
    fork_server = ForkServer(Channel(socket.socket(fileno=control_fd)), parent)
    try:
        fork_server.serve()
    except Closed:
        pass
    finally:
        fork_server.kill()
        signal.set_wakeup_fd(-1)  # before its socket is closed: more processes may end


class ForkServer:
    """The loop of the fork server process, and the ranks that it has forked and not yet reaped."""

    def __init__(self, control: Channel, parent: int):
        self.control = control
        self.pids: dict[int, int] = {}
        self.group = 0
        self.directory: Path | None = None
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # write to the terminal, even after `stty tostop`
        self.wakeup, woken = socket.socketpair()
        for end in (self.wakeup, woken):
            end.setblocking(False)
        self.woken = woken
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        # A copy of the user's process, forked by the user, can hold the socket open after it: watch the process too.
        self.parent_fd = os.pidfd_open(parent) if hasattr(os, "pidfd_open") else None

    def serve(self) -> None:
        """Answer messages and report exits until the user's process is gone (Closed)."""
        sources: list[Any] = [self.control, self.wakeup] + ([] if self.parent_fd is None else [self.parent_fd])
        while True:
            ready = wait(sources)
            if self.wakeup in ready:
                with contextlib.suppress(BlockingIOError):
                    self.wakeup.recv(4096)
                self.report_exits()
            if self.parent_fd in ready:
                raise Closed("the user's process is gone")
            if self.control in ready:
                self.answer(self.control.recv())

    def answer(self, message: Any) -> None:
        """Execute one message."""
        if isinstance(message, Check):
            answer = check(message.spec)
            die_with_parent(0)  # before the answer, since the thread may only be waiting for that
            self.control.send(answer)
            # Imported objects are never freed; frozen, they are not touched by the collector and their pages stay
            # shared.
            gc.collect()
            gc.freeze()
            gc.enable()  # it was off during the imports
        elif isinstance(message, Start):
            fds = receive_fds(self.control, message.world_size)
            self.start(message, fds)
            assert self.directory is not None
            self.control.send(RanksStarted(list(self.pids.values()), str(self.directory)))
        elif isinstance(message, Dump):
            self.control.send(self.stacks())
        elif isinstance(message, Kill):
            self.kill(message.grace_s)
            self.control.send(RanksStopped())

    def start(self, message: Start, fds: list[int]) -> None:
        """Fork one process per rank; each keeps only its own channel."""
        self.kill()
        self.directory = Path(tempfile.mkdtemp(prefix="shardit-"))
        sys.stdout.flush()  # or every rank would write the buffered output
        for rank in range(message.world_size):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # "multi-threaded, use of fork()": not true here
                pid = os.fork()
            if pid == 0:
                self.run_forked_rank(message, rank, fds)
            self.pids[rank] = pid
            self.group = self.group or pid
            join_group(pid, self.group)
        for fd in fds:
            os.close(fd)

    def run_forked_rank(self, message: Start, rank: int, fds: list[int]) -> None:
        """In the forked process: release the resources of the fork server and run the rank. Never returns."""
        code = 1
        try:
            parent = os.getppid()
            join_group(0, self.group)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            die_with_parent(signal.SIGKILL)
            if os.getppid() != parent:
                return
            # A copy of another rank's channel would hide that rank's end from the user's process.
            for fd in [fd for other, fd in enumerate(fds) if other != rank]:
                os.close(fd)
            for end in (self.control, self.wakeup, self.woken):
                end.close()
            if self.parent_fd is not None:
                os.close(self.parent_fd)
            assert self.directory is not None
            stack = (self.directory / f"stack-{rank}").open("a")
            faulthandler.register(signal.SIGUSR1, file=stack)

            from shardit.engine.rank import worker

            channel = Channel(socket.socket(fileno=fds[rank]))
            rendezvous = f"file://{self.directory}/rendezvous"
            code = worker.main(message.spec, rank, message.world_size, rendezvous, message.threads, channel)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            # Not sys.exit: exit handlers of the fork server are not for ranks.
            os._exit(code)

    def report_exits(self) -> None:
        """Send the exits of ranks to the user's process."""
        for rank, pid in list(self.pids.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self.pids[rank]
                self.control.send(Exited(rank, os.waitstatus_to_exitcode(status)))

    def stacks(self) -> Stacks:
        """Return the stack of every rank; ranks stuck in C code answer too, stopped ones do not."""
        assert self.directory is not None
        for rank, pid in self.pids.items():
            with contextlib.suppress(OSError):  # not there yet, or gone
                os.truncate(self.directory / f"stack-{rank}", 0)
            os.kill(pid, signal.SIGUSR1)
        time.sleep(STACK_DUMP_S)
        return Stacks({rank: (self.directory / f"stack-{rank}").read_text(errors="replace") for rank in self.pids})

    def kill(self, grace_s: float = 0.0) -> None:
        """Stop all ranks and their child processes, and remove their folder."""
        self.reap(grace_s)
        # The group also contains child processes of ranks. Without a rank in it, its number may belong to another group
        # by now.
        if self.pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.group, signal.SIGKILL)
        self.reap(KILL_TIMEOUT_S)
        self.pids, self.group = {}, 0
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = None

    def reap(self, grace_s: float) -> None:
        """Wait for ranks to exit, `grace_s` seconds at most."""
        deadline = time.monotonic() + grace_s
        while True:
            self.pids = {rank: pid for rank, pid in self.pids.items() if os.waitpid(pid, os.WNOHANG)[0] == 0}
            if not self.pids or time.monotonic() >= deadline:
                return
            time.sleep(0.005)


def check(spec: SessionSpec) -> Checked | InputRejected | Failed:
    """Import the packages that ranks need, and run the session module's own `check` if it has one."""
    try:
        module = importlib.import_module(spec.session.partition(":")[0])
        for name in ("shardit.engine.rank.worker", *getattr(module, "PRELOAD", PRELOAD)):
            importlib.import_module(name)
        if hasattr(module, "check"):
            module.check(spec)
    except InputError as error:
        return InputRejected.from_error(error)
    except Exception as error:
        if (missing := import_failure(error)) is not None:
            return InputRejected.from_error(missing_package(missing))
        return Failed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return Checked()


def receive_fds(channel: Channel, count: int) -> list[int]:
    """Receive the file descriptors that follow a `Start`."""
    fds = list(socket.recv_fds(channel.socket, 1, count)[1])
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def join_group(pid: int, group: int) -> None:
    """Put a process into a process group (0: its own). Both sides of a fork call it, as either may run first."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, group)
