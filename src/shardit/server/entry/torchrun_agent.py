"""A process started by torchrun under `shardit serve`: runs one rank, and on rank 0 the supervisor too.

The rank itself is a fork of this process, so that an agent, which has neither torch nor threads, always reacts: it
kills a rank that hangs, and it exits with the code from the supervisor, by which torchrun decides whether to start all
ranks again. Supervisor and agents never outlive each other.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import wait
from typing import Any

from shardit.engine.nodes.handshake import Endpoint, connect
from shardit.engine.nodes.node_info import node_info
from shardit.engine.nodes.rank_port import listen_for_ranks
from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.process import command, die_with_parent
from shardit.engine.rank.fork_server import join_group
from shardit.errors import InputError, RankError
from shardit.server.options import ServeOptions
from shardit.server.placement.torchrun import RESTART, Exit, Supervise
from shardit.server.placement.torchrun_env import LOOPBACK, RankEnv, hosts_of
from shardit.server.placement.torchrun_rank import exit_with_agent, run_rank

EXIT_CODE_TIMEOUT_S = 5.0
"""Seconds for the supervisor to send the exit code after the end of a rank, or a signal."""
SUPERVISOR_STOP_TIMEOUT_S = 9.0
CONTROL_TIMEOUT_S = 6.0
KILL_TIMEOUT_S = 5.0


def serve_as_rank(options: ServeOptions) -> int:
    """Run this process's rank until the server stops or all ranks are to be restarted; returns the exit code. Raises
    InputError if torchrun has started another number of ranks than the flags require."""
    rank_env, wanted = RankEnv.of_environment(), options.config.world_size
    if rank_env.world_size != wanted:
        raise InputError(
            f"torchrun has started {rank_env.world_size} ranks, but the parallel sizes need {wanted}; "
            f"make --nnodes times --nproc-per-node {wanted}, or change the parallel sizes"
        )
    if options.executor != "local":
        raise InputError(f"torchrun and --executor {options.executor} both place ranks; use one of them")
    return Agent(options, rank_env).run()


class Agent:
    """One agent and its child processes."""

    def __init__(self, options: ServeOptions, rank_env: RankEnv):
        self.options, self.rank_env = options, rank_env
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.control: Channel | None = None
        self.control_channel: Channel | None = None
        self.rank_pid: int | None = None
        self.from_rank: Channel | None = None
        self._rank_reported = False
        self._deadline, self._code_then = math.inf, RESTART
        self._signal: int | None = None
        self._wakeup, self._woken = socket.socketpair()

    def run(self) -> int:
        """Start all processes, wait for the end of one, stop all."""
        code = RESTART
        self._handle_signals()
        try:
            endpoint = self._start_supervisor() if self.rank_env.rank == 0 else None
            self._fork_rank(endpoint)
            code = self._watch()
        finally:
            code = self._end(code)
        return code

    def _handle_signals(self) -> None:
        def note(number: int, _: Any) -> None:
            if number != signal.SIGCHLD:
                self._signal = number

        for end in (self._wakeup, self._woken):
            end.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, note)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)

    # Starting.

    def _start_supervisor(self) -> Endpoint:
        hosts = hosts_of(self.rank_env)
        listener = listen_for_ranks(hosts[0] if hosts == LOOPBACK else "")
        endpoint = Endpoint(hosts, listener.getsockname()[1], secrets.token_hex(32))
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), listener.fileno())
        with theirs, listener:
            self.supervisor = subprocess.Popen(
                command("shardit.server.entry.torchrun_supervisor", *fds, os.getpid()),
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,  # torchrun's signals are for the agent, which passes them on
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.control = Channel(ours)
        self.control.send(Supervise(self.options, endpoint, self.rank_env.world_size, self.rank_env.restarts))
        return endpoint

    def _fork_rank(self, endpoint: Endpoint | None) -> None:
        ours, theirs = socket.socketpair()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        agent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ours.close()
                self._become_rank(Channel(theirs), agent)
                code = run_rank(self.options, self.rank_env, endpoint, Channel(theirs))
            except (InputError, RankError) as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            except BaseException as error:
                print(f"error: rank {self.rank_env.rank}: {type(error).__name__}: {error}", file=sys.stderr)
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        theirs.close()
        self.rank_pid, self.from_rank = pid, Channel(ours)

    def _become_rank(self, to_agent: Channel, agent: int) -> None:
        join_group(0, 0)  # torchrun signals the agent's group
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        faulthandler.register(signal.SIGUSR1)  # dumps its stack
        die_with_parent(signal.SIGKILL)
        if os.getppid() != agent:
            os._exit(1)
        if self.control is not None:
            self.control.close()
        for end in (self._wakeup, self._woken):
            end.close()
        threading.Thread(target=exit_with_agent, args=(to_agent.socket,), daemon=True).start()

    # Waiting.

    def _watch(self) -> int:
        while True:
            left = self._deadline - time.monotonic()
            sockets = {"signal": self._wakeup}
            from_rank = None if self._rank_reported else self.from_rank
            for name, channel in (
                ("control_channel", self.control_channel),
                ("rank", from_rank),
                ("control", self.control),
            ):
                if channel is not None:
                    sockets[name] = channel.socket
            found = wait(list(sockets.values()), None if left == math.inf else max(0.0, left))
            ready = {name for name, sock in sockets.items() if sock in found}
            if "control_channel" in ready:
                return _code_from(self.control_channel)
            if "rank" in ready:
                self._read_rank()
            if "signal" in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wakeup.recv(4096)
                self._on_signal()
                self._reap_rank()
            elif "control" in ready:  # the supervisor sends nothing here: it has exited
                return self._code_of_supervisor()
            if time.monotonic() >= self._deadline:
                return self._code_then

    def _read_rank(self) -> None:
        assert self.from_rank is not None
        try:
            endpoint = self.from_rank.recv()
            hello = {**node_info(self.rank_env.rank), "role": "agent"}
            self.control_channel, _ = connect(endpoint, hello, CONTROL_TIMEOUT_S)
        except (Closed, OSError):
            pass  # it has exited; a signal follows
        except RankError:
            self._end_by(0.0, RESTART)
        # It stays open: its end shows the rank that the agent has exited.
        self._rank_reported = True

    def _on_signal(self) -> None:
        number, self._signal = self._signal, None
        if number is None:
            return
        if self.control is not None:
            with contextlib.suppress(Closed, OSError):
                self.control.send(Exit(0))
            self._end_by(SUPERVISOR_STOP_TIMEOUT_S, 0)
        else:
            self._end_by(EXIT_CODE_TIMEOUT_S, 128 + number)

    def _reap_rank(self) -> None:
        if self.rank_pid is not None and os.waitpid(self.rank_pid, os.WNOHANG)[0]:
            self.rank_pid = None
            self._end_by(EXIT_CODE_TIMEOUT_S if self.control_channel is not None else 0.0, RESTART)

    def _end_by(self, seconds: float, code: int) -> None:
        if self._deadline == math.inf:
            self._deadline, self._code_then = time.monotonic() + seconds, code

    def _code_of_supervisor(self) -> int:
        assert self.supervisor is not None
        try:
            code = self.supervisor.wait(SUPERVISOR_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return RESTART
        return code if code in (0, 2) else RESTART

    # Ending.

    def _end(self, code: int) -> int:
        if self.rank_pid is not None:
            for kill in (os.killpg, os.kill):  # its child processes, too; it may not have its own group yet
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(self.rank_pid, signal.SIGKILL)
            deadline = time.monotonic() + KILL_TIMEOUT_S
            while os.waitpid(self.rank_pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
        if self.supervisor is not None:
            with contextlib.suppress(Closed, OSError):
                assert self.control is not None
                self.control.send(Exit(code))
            try:
                self.supervisor.wait(SUPERVISOR_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.supervisor.kill()
                self.supervisor.wait()
        return code


def _code_from(control_channel: Channel | None) -> int:
    assert control_channel is not None
    try:
        message = control_channel.recv()
    except (Closed, OSError):
        return RESTART
    return message.code
