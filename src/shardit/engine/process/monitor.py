"""The watch over ranks that work: it notices those that refuse, fail, die or hang, and finds out which was first."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import shardit
from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.fork_client import ForkServer
from shardit.engine.process.messages import Ended, Exited, Failed, Refused
from shardit.engine.process.process import describe_exit
from shardit.errors import RankError

GRACE_S = 1.0
"""Seconds. After a rank's own failure: time for a failure that came before it to arrive too."""
PEER_GRACE_S = 4.0
"""Seconds. After a failure that speaks of a peer: time for that peer's own."""

_COMMUNICATES = ("torch/distributed", str(Path(shardit.__file__).parent / "core" / "comm"))
"""The files that the innermost frames of a rank name while it waits for others."""

DOUBT_S = 1.0
"""Seconds. After a request has ended on some ranks and not on others: time for those before their stacks are read."""


@dataclass(frozen=True)
class Failure:
    """Why a rank is out. The lowest `weight` is the likely root: 0 own error or signal, 1 abort, 2 speaks of a peer."""

    rank: int
    reason: str
    weight: int = 0


class Monitor:
    """Waits until every rank has answered; raises RankError or InputError where one cannot.

    `together`: how many consecutive ranks work on the same requests (default: all).
    """

    def __init__(self, fork_server: ForkServer, channels: list[Channel], timeout_s: float, together: int | None = None):
        self.together = together or len(channels)
        self.fork_server = fork_server
        self.timeout_s = timeout_s
        self.open = dict(enumerate(channels))
        self.silent = set(self.open)
        self.out: set[int] = set()
        self.failures: list[Failure] = []
        self.refused: Refused | None = None
        self.answers: dict[int, Any] = {}
        self.patience = time.monotonic() + timeout_s
        self.grace = math.inf
        self.ended: dict[int, dict[int, str]] = {}  # request -> rank -> why, where not all ranks have said so yet
        self.doubt = math.inf
        self._stacks: dict[int, str] | None = None

    def collect(self, wanted: type, on_message: Callable[[Any], None] | None = None) -> list[Any]:
        """One message of type `wanted` per rank, in the order of ranks; all others go to `on_message`."""
        while self.silent:
            left = min(self.patience, self.grace, self.doubt) - time.monotonic()
            ready = readable([self.fork_server.control, *self.open.values()], max(0.0, left))
            if not ready and self.doubt < min(self.patience, self.grace):
                self._look()
                continue
            # After a failure others may go on talking; before one, what has arrived counts, however late it is read.
            if not ready or time.monotonic() > self.grace:
                break
            for rank, channel in list(self.open.items()):
                if channel in ready:
                    self._read(rank, wanted, on_message)
            if self.fork_server.control in ready:
                self._read_control(wanted, on_message)
        self._raise_verdict()
        return [self.answers[rank] for rank in sorted(self.answers)]

    def _read(self, rank: int, wanted: type, on_message: Callable[[Any], None] | None) -> None:
        try:
            message = self.open[rank].recv()
        except Closed:
            # The fork server will say how it ended. If it does not, the rank closed the channel and lives.
            del self.open[rank]
            if rank in self.silent:
                self._hurry(PEER_GRACE_S)
            return
        except TimeoutError:
            self._fail(Failure(rank, f"stopped in the middle of a message for {self.timeout_s:g} s"))
            return
        if isinstance(message, Failed):
            self._fail(Failure(rank, message.reason, 2 if message.of_peer else 0))
        elif isinstance(message, Refused):
            self.refused = self.refused or message
            self._put_out(rank, GRACE_S)
        elif isinstance(message, Ended):
            self._note_end(rank, message)
        elif isinstance(message, wanted):
            self.answers[rank] = message
            self.silent.discard(rank)
        elif on_message is not None:
            self.patience = time.monotonic() + self.timeout_s
            on_message(message)

    def _read_control(self, wanted: type, on_message: Callable[[Any], None] | None) -> None:
        try:
            message = self.fork_server.control.recv()
        except Closed:
            self._fail(Failure(-1, f"the process that starts ranks {self.fork_server.how_it_ended()}"))
            self.silent.clear()
            return
        if isinstance(message, Exited):
            # What it said before it ended counts first.
            while message.rank in self.open and readable([self.open[message.rank]], 0):
                self._read(message.rank, wanted, on_message)
            aborted = message.code == -signal.SIGABRT
            self._fail(Failure(message.rank, describe_exit(message.code), 1 if aborted else 0))

    def _note_end(self, rank: int, message: Ended) -> None:
        ranks = self.ended.setdefault(message.index, {})
        ranks[rank] = message.reason
        known = self.silent | self.out | self.answers.keys()
        if len(ranks) == sum(other // self.together == rank // self.together for other in known):
            del self.ended[message.index]
        self._stacks = None
        self.doubt = time.monotonic() + DOUBT_S if self.ended else math.inf

    def _look(self) -> None:
        """Whether a request that has ended on some ranks only has left all ranks waiting for each other."""
        before, self._stacks = self._stacks, self.fork_server.stacks()
        self.doubt = time.monotonic() + DOUBT_S
        stuck = all(waits_for_peer(self._stacks.get(rank, "")) for rank in self.silent)
        if stuck and self._stacks == before:
            self.doubt = math.inf
            self._fail(Failure(self._alone().rank, self._alone().reason))

    def _alone(self) -> RankError:
        rank, reason = next(iter(next(iter(self.ended.values())).items()))
        return RankError(rank, f"it alone ended a request: {reason}")

    def _fail(self, failure: Failure) -> None:
        # A rank that told its error and then exits has failed once.
        if failure.rank not in self.out:
            self.failures.append(failure)
            self._put_out(failure.rank, GRACE_S if failure.weight == 0 else PEER_GRACE_S)

    def _put_out(self, rank: int, grace_s: float) -> None:
        self.out.add(rank)
        self.silent.discard(rank)
        self._hurry(grace_s)

    def _hurry(self, grace_s: float) -> None:
        self.grace = min(self.grace, time.monotonic() + grace_s)

    def _raise_verdict(self) -> None:
        root = min(self.failures, key=lambda failure: failure.weight, default=None)
        if self.refused is not None and (root is None or root.weight > 0):
            raise self.refused.error()
        if self.ended and (root is None or root.weight == 2):
            raise self._alone()
        if self.silent and (root is None or root.weight == 2):
            raise self._hang(root)
        if root is not None:
            raise RankError(root.rank, root.reason)

    def _hang(self, peer: Failure | None) -> RankError:
        stacks = self.fork_server.stacks()
        rank = suspect(stacks, self.silent)
        waited = f"no progress for {self.timeout_s:g} s" if peer is None else "it hangs and its peers gave up"
        where = f"where it was:\n{stacks[rank].rstrip()}" if stacks.get(rank) else "it does not react (stopped?)"
        return RankError(rank, f"{waited}; {where}")


def readable(channels: list[Channel], timeout_s: float) -> list[Channel]:
    """The channels that have something to read (an end counts), after `timeout_s` at most."""
    by_fd = {channel.fileno(): channel for channel in channels}
    return [by_fd[fd] for fd in wait(list(by_fd), timeout_s) if isinstance(fd, int)]


def suspect(stacks: dict[int, str], silent: set[int]) -> int:
    """The rank that most likely holds the others up: one that is stopped, else one that does not wait for a peer."""
    ranks = sorted(silent)
    for rank in ranks:
        if not stacks.get(rank):
            return rank
    return next((rank for rank in ranks if not waits_for_peer(stacks[rank])), ranks[0])


def waits_for_peer(stack: str) -> bool:
    """Whether a rank with this stack is in the middle of communication."""
    return any(place in line for line in frames(stack)[:3] for place in _COMMUNICATES)


def frames(stack: str) -> list[str]:
    """The frames of a rank's main thread, the innermost first; [] for a rank that did not react."""
    of_main = stack.rpartition("(most recent call first)")[2]  # the oldest thread comes last
    return [line.strip() for line in of_main.splitlines() if line.strip().startswith("File ")]
