"""Collective operations along one axis of the mesh, for shards of unequal size, with what they send counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardit.core.comm.mesh import AxisGroup, Mesh
from shardit.core.runtime.coroutine import yield_while_waiting
from shardit.errors import RankError


class Collectives:
    """What the ranks of one axis do together. Every wait is bounded by the mesh's timeout and ends in RankError.

    sent_bytes, messages: what this rank has sent to others, and in how many calls.
    """

    def __init__(self, mesh: Mesh, axis: str):
        self.mesh, self.axis = mesh, axis
        self.members: AxisGroup = mesh.axes[axis]
        self.index, self.size = self.members.index, self.members.size
        self.sent_bytes = 0
        self.messages = 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; the same bits on every rank."""
        self._count(2 * tensor.numel() * tensor.element_size() * (self.size - 1) // self.size)
        work = self._guard(lambda: dist.all_reduce(tensor, group=self.members.group, async_op=True), "all-reduce")
        yield_while_waiting()
        self._wait([work], "all-reduce", tensor)
        return tensor

    def all_gather(self, shard: torch.Tensor, sizes: Sequence[int], dim: int) -> torch.Tensor:
        """The shards of all ranks, one after the other along `dim`; sizes[i] is the length of rank i's."""
        front = shard.movedim(dim, 0).contiguous()
        full = front.new_empty((sum(sizes), *front.shape[1:]))
        parts = full.split(list(sizes))
        parts[self.index].copy_(front)
        self._exchange([front] * self.size, list(parts))
        return full.movedim(0, dim)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]) -> None:
        """Send sends[i] to rank i and fill receives[i] from it. All are contiguous. The own part is copied unless it
        is the same tensor in both."""
        if receives[self.index] is not sends[self.index]:
            receives[self.index].copy_(sends[self.index])
        self._exchange(sends, receives)

    def rotate(self, send: torch.Tensor, receive: torch.Tensor) -> Callable[[], None]:
        """Start sending to the next rank and receiving from the previous one; returns what waits for both.

        Empty tensors do not travel: both sides know that they are empty."""
        ranks, group = self.members.ranks, self.members.group
        after, before = ranks[(self.index + 1) % self.size], ranks[(self.index - 1) % self.size]
        ops = [dist.P2POp(dist.irecv, receive, before, group)] if receive.numel() else []
        if send.numel():
            self._count(send.numel() * send.element_size())
            ops.insert(0, dist.P2POp(dist.isend, send, after, group))
        works = self._guard(lambda: dist.batch_isend_irecv(ops), "rotate") if ops else []

        def wait() -> None:
            if works:
                yield_while_waiting()
                self._wait(works, "rotate", (send, receive))

        return wait

    def _exchange(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]) -> None:
        """P2P between all pairs, empty messages left out. gloo has no gather or all-to-all of unequal lists."""
        ops = []
        for step in range(1, self.size):
            to, source = (self.index + step) % self.size, (self.index - step) % self.size
            if sends[to].numel():
                self._count(sends[to].numel() * sends[to].element_size())
                ops.append(dist.P2POp(dist.isend, sends[to], self.members.ranks[to], self.members.group))
            if receives[source].numel():
                ops.append(dist.P2POp(dist.irecv, receives[source], self.members.ranks[source], self.members.group))
        if ops:
            works = self._guard(lambda: dist.batch_isend_irecv(ops), "exchange")
            yield_while_waiting()
            self._wait(works, "exchange", ops)

    def _wait(self, works: Sequence[Any], what: str, alive: Any) -> None:
        """Wait; `alive` holds the memory of the messages until then."""
        for work in works:
            self._guard(lambda: work.wait(self.mesh.timeout), what)  # noqa: B023
        del alive

    def _count(self, nbytes: int) -> None:
        self.sent_bytes += nbytes
        self.messages += 1

    def _guard(self, act: Callable[[], Any], what: str) -> Any:
        try:
            return act()
        except RuntimeError as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = f"communication failed ({what} along {self.axis}): {text}"
            raise RankError(self.mesh.rank, reason) from error


def even_sizes(total: int, parts: int) -> list[int]:
    """Lengths of `parts` runs of `total` things that differ by at most one, the longer ones first."""
    size, left_over = divmod(total, parts)
    return [size + (i < left_over) for i in range(parts)]
