"""Messages between ranks that work together: from one to another, and small ones that all exchange."""

from __future__ import annotations

import functools
import pickle
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from shardit.core.comm.mesh import Groups, Mesh
from shardit.core.comm.wire import flat_bytes
from shardit.errors import RankError

COUNTS, EXCHANGE = 1, 2
"""Tags of the numbers of `send_count`, and of `gather_bytes`, which share a group with other messages."""
COUNTS_AHEAD = 64
"""How many of these numbers a rank may have been sent and not taken."""
FEW = 4
"""Ranks that exchange small messages each with each."""


@dataclass(eq=False)
class Transfer:
    """A message under way: the handle and the memory, which must both live until it is done (then they are None)."""

    work: dist.Work | None
    message: torch.Tensor | None
    what: str


class Comm:
    """Point-to-point messages and broadcasts among the members of `groups`, addressed by their index (the stage).

    Sends are asynchronous; their buffers are held until somebody waits for them, who knows that they were taken, or
    until there are more than `max_outstanding`. Every wait is bounded by the mesh's timeout and ends in RankError.
    """

    def __init__(self, mesh: Mesh, groups: Groups | None = None, max_outstanding: int = 64):
        self.mesh = mesh
        self.groups = groups or mesh.pipeline
        self.rank = self.groups.ranks.index(mesh.rank)
        self.size = len(self.groups.ranks)
        self.sent_bytes = 0
        self.messages = 0
        self.waited_s = 0.0
        self._outstanding: dict[Transfer, None] = {}  # oldest first
        self._max_outstanding = max_outstanding
        self._counts: deque[Transfer] = deque()
        self._expected: deque[tuple[torch.Tensor, Transfer]] = deque()

    def send(self, message: torch.Tensor, target: int, *, result: bool = False) -> Transfer:
        """Start sending a flat byte message to stage `target`. The caller must not write to it any more."""
        group = self.groups.back if result else self.groups.edge(self.rank, target)
        work = self._guard(lambda: dist.isend(message, self.groups.ranks[target], group=group), f"send to {target}")
        self.sent_bytes += message.numel()
        self.messages += 1
        # gloo cancels a send whose handle is dropped, and frees nothing before it is waited for.
        return self._hold(Transfer(work, message, f"send to stage {target}"))

    def receive(self, message: torch.Tensor, source: int, *, result: bool = False) -> Transfer:
        """Post the receive of a flat byte message from stage `source`; wait for it with `wait`."""
        group = self.groups.back if result else self.groups.edge(source, self.rank)
        what = f"receive from stage {source}"
        work = self._guard(lambda: dist.irecv(message, self.groups.ranks[source], group=group), what)
        transfer = Transfer(work, message, what)
        if result:  # nobody may ever look at a result, but its sender needs it to be taken
            self._hold(transfer)
        return transfer

    def wait(self, transfer: Transfer) -> None:
        """Wait for a transfer (on a GPU: make the current stream wait). Raises RankError after the timeout."""
        work = transfer.work
        if work is not None:
            since = time.perf_counter()
            self._guard(lambda: work.wait(self.mesh.timeout), transfer.what)
            self.waited_s += time.perf_counter() - since
            transfer.work = transfer.message = None
        self._outstanding.pop(transfer, None)

    def flush(self) -> None:
        """Wait until everything sent has been taken."""
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
            raw = tensor if tensor.dtype is torch.uint8 else flat_bytes(tensor)
            self._guard(lambda: dist.broadcast(raw, self.groups.ranks[source], group=self.groups.back), "broadcast")

    def broadcast_object(self, value: Any, source: int) -> Any:
        """Broadcast a picklable object from stage `source`; returns it on every stage."""
        data = pickle.dumps(value, protocol=5) if self.rank == source else b""
        return pickle.loads(self.broadcast_blob(data, source))

    def broadcast_blob(self, data: bytes, source: int) -> bytes:
        """Broadcast bytes of a length that only `source` knows."""
        if self.size == 1:
            return data
        root, group = self.groups.ranks[source], self.groups.control
        length = torch.tensor([len(data)], dtype=torch.int64)
        self._guard(lambda: dist.broadcast(length, root, group=group), "broadcast")
        if not int(length):
            return b""
        blob = torch.frombuffer(bytearray(data if self.rank == source else int(length)), dtype=torch.uint8)
        self._guard(lambda: dist.broadcast(blob, root, group=group), "broadcast")
        return blob.numpy().tobytes()

    def send_count(self, count: int) -> None:
        """From the first stage: send a number to all others, who take it with `receive_count`; does not wait."""
        number = torch.tensor([count], dtype=torch.int64)
        group = self.groups.control
        for rank in self.groups.ranks[1:]:
            work = self._guard(functools.partial(dist.isend, number, rank, group=group, tag=COUNTS), f"send to {rank}")
            # Not held with the others: in a large group one round of counts would fill that, and then wait for ranks
            # that wait for this one.
            self._counts.append(Transfer(work, number, f"send to rank {rank}"))
        while len(self._counts) > COUNTS_AHEAD * (self.size - 1):
            self.wait(self._counts.popleft())

    def receive_count(self) -> int:
        """The next number that the first stage has sent. Always one more is expected already: gloo sends nothing before
        the other side has said that it expects it, which takes milliseconds where all processors are busy."""
        while len(self._expected) < 2:
            number = torch.empty(1, dtype=torch.int64)
            root, group, what = self.groups.ranks[0], self.groups.control, "receive from 0"
            work = self._guard(functools.partial(dist.irecv, number, root, group=group, tag=COUNTS), what)
            self._expected.append((number, Transfer(work, number, what)))
        number, transfer = self._expected.popleft()
        self.wait(transfer)
        return int(number)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every stage's object, in stage order, on every stage."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        self._guard(lambda: dist.all_gather_object(out, value, group=self.groups.control), "gather")
        return out

    def gather_bytes(self, value: bytes) -> list[bytes]:
        """Every stage's bytes, in stage order, on every stage; all give equally many, so this is one message."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        out = [torch.empty_like(mine) for _ in range(self.size)]
        gather = self._exchange if self.size <= FEW else functools.partial(dist.all_gather, group=self.groups.control)
        self._guard(lambda: gather(out, mine), "gather")
        out[self.rank] = mine
        return [one.numpy().tobytes() for one in out]

    def _exchange(self, out: list[torch.Tensor], mine: torch.Tensor) -> None:
        """Each stage sends to each other: among few that takes a third of the time of an all-gather."""
        group, others = self.groups.control, [rank for rank in self.groups.ranks if rank != self.mesh.rank]
        places = [out[self.groups.ranks.index(rank)] for rank in others]
        works = [dist.irecv(place, r, group=group, tag=EXCHANGE) for place, r in zip(places, others, strict=True)]
        works += [dist.isend(mine, rank, group=group, tag=EXCHANGE) for rank in others]
        for work in works:
            assert work is not None
            work.wait(self.mesh.timeout)

    def barrier(self) -> None:
        """Wait until every stage is here."""
        self.gather_objects(None)

    def _guard(self, act: Any, what: str) -> Any:
        try:
            return act()
        except RuntimeError as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RankError(self.mesh.rank, f"communication failed ({what}): {text}") from error
