"""Point-to-point messages between cooperating ranks; buffers of messages in flight are kept alive."""

from __future__ import annotations

import functools
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.wire import flat_bytes

AHEAD_BYTES = 1 << 18
"""Largest message on CPUs that is received in a buffer posted ahead of it. gloo sends nothing before the other side has
announced the receive, which takes milliseconds if all processors are busy."""
AHEAD = 3
"""The tag of these messages."""
COUNTS = 1
"""The tag of the numbers of `send_count`, which share a group with other messages."""
COUNTS_AHEAD = 64
"""Largest number of such numbers sent to a rank and not yet received."""


@dataclass(eq=False)
class Transfer:
    """A message in flight: the handle and the memory, which must both live until it is done (then they are None).
    posted: the buffer that was posted ahead for a received message, which may be longer."""

    work: dist.Work | None
    message: torch.Tensor | None
    what: str
    posted: torch.Tensor | None = None


class Comm:
    """Point-to-point messages and broadcasts of bytes among the members of `group`, addressed by their place (the
    stage).

    Sends are asynchronous; their buffers are held until a wait shows that they were received, or until there are more
    than `max_outstanding`. Every wait is bounded and ends in RankError.
    """

    def __init__(self, group: GroupCoordinator, max_outstanding: int = 64):
        self.group = group
        self.rank, self.size = group.rank_in_group, group.world_size
        self.sent_bytes = 0
        self.messages = 0
        self.waited_s = 0.0
        self._outstanding: dict[Transfer, None] = {}  # oldest first
        self._max_outstanding = max_outstanding
        self._counts: deque[Transfer] = deque()
        self._expected: deque[tuple[torch.Tensor, Transfer]] = deque()

    def send(self, message: torch.Tensor, target: int, *, result: bool = False) -> Transfer:
        """Start sending a flat byte message to stage `target`. The caller must not write to it any more."""
        (group, place), tag = self._path(self.rank, target, result), AHEAD if self._is_small(message) else 0
        work = self.group.call(lambda: group.send([message], place, tag), f"send to {target}")
        self.sent_bytes += message.numel()
        self.messages += 1
        # gloo cancels a send whose handle is dropped, and frees nothing before a wait for it.
        return self._hold(Transfer(work, message, f"send to stage {target}"))

    def receive(self, message: torch.Tensor, source: int, *, result: bool = False) -> Transfer:
        """Post the receive of a flat byte message from stage `source`; wait for it with `wait`."""
        if self._is_small(message):
            posted, path = self.group.posted, (source, result or (source, self.rank) not in self.group.edges)
            transfer = posted.pop(path, None) or self._post(self._buffer(), source, result, AHEAD)
            posted[path] = self._post(self._buffer(), source, result, AHEAD)
            transfer.posted, transfer.message = transfer.message, message
        else:
            transfer = self._post(message, source, result)
        if result:  # a result may never be used, but its sender needs it to be received
            self._hold(transfer)
        return transfer

    def _post(self, message: torch.Tensor, source: int, result: bool, tag: int = 0) -> Transfer:
        (group, place), what = self._path(source, self.rank, result), f"receive from stage {source}"
        work = self.group.call(lambda: group.recv([message], place, tag), what)
        return Transfer(work, message, what)

    def _is_small(self, message: torch.Tensor) -> bool:
        return message.numel() <= AHEAD_BYTES and message.device.type == "cpu"

    def _buffer(self) -> torch.Tensor:
        return self.group.spare.pop() if self.group.spare else torch.empty(AHEAD_BYTES, dtype=torch.uint8)

    def _path(self, source: int, target: int, result: bool) -> tuple[Any, int]:
        """Return the torch group of a message, and the other rank's place in it: that of the hop between two stages;
        results and hops off the ring share one."""
        other = source if target == self.rank else target
        edge = None if result else self.group.edges.get((source, target))
        return (self.group.device_group, other) if edge is None else (edge, int(other > self.rank))

    def wait(self, transfer: Transfer) -> None:
        """Wait for a transfer (on a GPU: make the current stream wait). Raises RankError after the timeout."""
        work = transfer.work
        if work is not None:
            since = time.perf_counter()
            self.group.wait([work], transfer.what)
            self.waited_s += time.perf_counter() - since
            if transfer.posted is not None and transfer.message is not None:
                transfer.message.copy_(transfer.posted[: transfer.message.numel()])
                self.group.spare.append(transfer.posted)
            transfer.work = transfer.message = transfer.posted = None
        self._outstanding.pop(transfer, None)

    def flush(self) -> None:
        """Wait until all sent messages have been received."""
        while self._outstanding:
            self.wait(next(iter(self._outstanding)))
        while self._counts:
            self.wait(self._counts.popleft())

    def _hold(self, transfer: Transfer) -> Transfer:
        self._outstanding[transfer] = None
        while len(self._outstanding) > self._max_outstanding:
            self.wait(next(iter(self._outstanding)))
        return transfer

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Broadcast a contiguous tensor in place from stage `source` to all stages."""
        if tensor.numel() and self.size > 1:
            self.group.broadcast(tensor if tensor.dtype is torch.uint8 else flat_bytes(tensor), source)

    def send_count(self, count: int) -> None:
        """From the first stage: send a number to all others, which receive it with `receive_count`; does not wait."""
        number = torch.tensor([count], dtype=torch.int64)
        group = self.group.cpu_group
        for rank in self.group.ranks[1:]:
            work = self.group.call(
                functools.partial(dist.isend, number, rank, group=group, tag=COUNTS), f"send to {rank}"
            )
            # Not held with the others: in a large group one round of counts would fill that, and then wait for ranks
            # that wait for this one.
            self._counts.append(Transfer(work, number, f"send to rank {rank}"))
        while len(self._counts) > COUNTS_AHEAD * (self.size - 1):
            self.wait(self._counts.popleft())

    def receive_count(self) -> int:
        """Return the next number that the first stage has sent. One more receive is always posted already: gloo sends
        nothing before the other side has announced the receive, which takes milliseconds if all processors are busy."""
        while len(self._expected) < 2:
            number = torch.empty(1, dtype=torch.int64)
            root, group, what = self.group.ranks[0], self.group.cpu_group, "receive from 0"
            work = self.group.call(functools.partial(dist.irecv, number, root, group=group, tag=COUNTS), what)
            self._expected.append((number, Transfer(work, number, what)))
        number, transfer = self._expected.popleft()
        self.wait(transfer)
        return int(number)
