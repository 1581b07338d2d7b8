"""Failures of ranks, and the choice of the likely root among several."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from shardit.engine.process.messages import InputRejected
from shardit.engine.process.process import describe_exit
from shardit.errors import InputError, RankError


class Cause(IntEnum):
    """Kinds of failures. The lowest of several is the likely root; among equal ones, the first."""

    CERTAIN = 0
    """Found by the process that monitors the ranks, or out of memory: it explains the others."""
    OWN = 1
    """An error, a signal or an exit of the rank itself."""
    REJECTED = 2
    """The rank rejected the user's request."""
    CLOSED = 3
    """The connection has closed, and the state of the process is unknown."""
    ABORTED = 4
    """SIGABRT: torch aborts a process whose peers have left."""
    PEER = 5
    """The error mentions the failure of another rank."""


@dataclass(frozen=True)
class Failure:
    """The reason why the ranks are not up. rank: -1 if it is none in particular. rejection: the model or the options
    are at fault, and another start would fail too. memory: out of memory."""

    reason: str
    cause: Cause = Cause.CERTAIN
    rank: int = -1
    rejection: InputRejected | None = None
    memory: bool = False

    @classmethod
    def of_exit(cls, rank: int, code: int) -> Failure:
        """Build the failure of a rank's process from its return code as `subprocess` counts it."""
        cause = Cause.ABORTED if code == -signal.SIGABRT else Cause.OWN
        return cls(describe_exit(code), cause, rank)

    @classmethod
    def of_rejection(cls, rejection: InputRejected, rank: int = -1) -> Failure:
        """Build the failure of a user's mistake that was found by a rank, or by the check before the start."""
        return cls(rejection.text, Cause.REJECTED, rank, rejection)

    def error(self) -> InputError | RankError:
        """Return the exception for the user."""
        return RankError(self.rank, self.reason) if self.rejection is None else self.rejection.error()

    @property
    def text(self) -> str:
        """The reason with the rank."""
        return str(self.error())


def root_of(failures: Iterable[Failure]) -> Failure:
    """Return the likely root of several failures, in the order of their arrival."""
    return min(failures, key=lambda failure: failure.cause)


@dataclass(frozen=True)
class Timeouts:
    """Seconds to wait after a failure for the arrival of an earlier one: after a rank's own, after a closed connection,
    and after one that names a peer. probe_s: between two inspections of ranks when some have failed a request."""

    own_s: float = 0.5
    closed_s: float = 1.0
    peer_s: float = 4.0
    probe_s: float = 0.5

    def after(self, cause: Cause) -> float:
        """Return the seconds for one kind of failure."""
        if cause is Cause.CERTAIN:
            return 0.0
        if cause in (Cause.OWN, Cause.REJECTED):
            return self.own_s
        return self.closed_s if cause is Cause.CLOSED else self.peer_s
