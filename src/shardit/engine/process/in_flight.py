"""A request in flight on the ranks of a replica, and their answers so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardit.engine.process.messages import RequestFailed, RequestFinished


@dataclass
class InFlight:
    """One request on the ranks `ranks`, which are replica `replica` of the model.

    finished: the last message about the request, by rank. errors: why the request failed, by rank; it has to fail on
    all of them, but a rank that fails alone may never come to compare itself with the others.
    """

    replica: int
    ranks: range
    finished: dict[int, RequestFinished] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    def record(self, rank: int, message: RequestFailed | RequestFinished) -> None:
        """Store an answer of a rank."""
        if isinstance(message, RequestFailed):
            self.errors[rank] = message.reason
        else:
            self.finished[rank] = message

    @property
    def complete(self) -> bool:
        """Return whether every rank has finished it."""
        return len(self.finished) == len(self.ranks)

    @property
    def first(self) -> RequestFinished:
        """The answer of the first rank, which has the output."""
        return self.finished[self.ranks[0]]

    @property
    def alone(self) -> tuple[int, str] | None:
        """Return a rank that has failed the request and the reason, if not all ranks have failed it. The others may
        still fail, or wait forever."""
        if 0 < len(self.errors) < len(self.ranks):
            return next(iter(self.errors.items()))
        return None

    def difference(self) -> dict[int, object] | None:
        """Return the outcome by rank if the ranks differ in it so far, else None."""
        failed = self.errors.keys() - self.finished.keys()
        outcomes = {(end.start, end.cancelled, end.error is None) for end in self.finished.values()}
        if len(outcomes) < 2 and not (failed and any(good for *_, good in outcomes)):
            return None
        found: dict[int, object] = {rank: (end.start, end.cancelled, end.error) for rank, end in self.finished.items()}
        return found | {rank: self.errors[rank] for rank in failed}
