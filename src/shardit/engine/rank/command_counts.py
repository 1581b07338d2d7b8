"""Number of commands that take effect in each round, the only value on which the ranks of a replica must agree."""

from __future__ import annotations

import select
from collections import deque
from typing import Any

from shardit.engine.process.channel import Channel


class Counts:
    """The number of commands that take effect in each round, decided by the first rank of a replica, a round `ahead` or
    when the round begins."""

    def __init__(self, session: Any):
        self.comm = session.replica
        self.ahead = session.mesh.sizes["pp"] > 1
        self._sent: deque[int] = deque([0] if self.ahead else [])  # of the first round: nothing

    def next(self) -> int:
        """Return the number for the round that begins. Raises RankError after the timeout."""
        if self._sent:
            return self._sent.popleft()
        return self.comm.receive_count()

    def send(self, count: int) -> None:
        """On the first rank: send the next number."""
        self._sent.append(count)
        if self.comm is not None:
            self.comm.send_count(count)


def readable(channel: Channel, timeout_s: float | None) -> bool:
    """Return whether a message (or the end) can be read, after waiting for `timeout_s` at most, or forever."""
    return bool(select.select([channel], [], [], timeout_s)[0])
