"""Collective operations along one axis of the mesh, for shards of unequal size, with what they send counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shardit.core.comm.group import GroupCoordinator
from shardit.core.runtime.yielding import yield_while_waiting


class Collectives:
    """Collectives of the ranks of one axis on shards. Every wait is bounded and ends in RankError.

    sent_bytes, messages: bytes that this rank has sent to others, and number of calls. trains: the ranks train a model
    together, so backward passes may use these operations.
    """

    def __init__(self, group: GroupCoordinator):
        self.group = group
        self.index, self.size = group.rank_in_group, group.world_size
        self.sent_bytes = 0
        self.messages = 0
        self.trains = False

    def all_reduce(self, tensor: torch.Tensor, meanwhile: Callable[[], object] = yield_while_waiting) -> torch.Tensor:
        """Return the sum over all ranks, in place; the same bits on every rank. meanwhile: what runs during the
        message: by default, other calls."""
        self._count(2 * tensor.numel() * tensor.element_size() * (self.size - 1) // self.size)
        work = self.group.start_all_reduce(tensor)
        meanwhile()
        self.group.wait([work], "all-reduce", tensor)
        return tensor

    def all_gather(self, shard: torch.Tensor, sizes: Sequence[int], dim: int) -> torch.Tensor:
        """Return the shards of all ranks, one after the other along `dim`; sizes[i] is the length of rank i's."""
        front = shard.movedim(dim, 0).contiguous()
        full = front.new_empty((sum(sizes), *front.shape[1:]))
        parts = full.split(list(sizes))
        parts[self.index].copy_(front)
        self._exchange([front] * self.size, list(parts))
        return full.movedim(0, dim)

    def reduce_scatter(self, full: torch.Tensor, sizes: Sequence[int], dim: int) -> torch.Tensor:
        """Return this rank's part of the sum of the tensors of all ranks; sizes[i] is the length of rank i's along
        `dim`."""
        sends = [part.contiguous() for part in full.movedim(dim, 0).split(list(sizes))]
        own = sends[self.index]
        receives = [own if rank == self.index else torch.empty_like(own) for rank in range(self.size)]
        self._exchange(sends, receives)
        total = receives[0]
        for part in receives[1:]:
            total = total + part
        return total.movedim(0, dim)

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the first rank's tensor, of which every rank has one of the same shape."""
        flat = tensor.flatten()
        sizes = [flat.numel() if rank == 0 else 0 for rank in range(self.size)]
        return self.all_gather(flat[: sizes[self.index]], sizes, 0).view(tensor.shape)

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]) -> None:
        """Send sends[i] to rank i and fill receives[i] from it. All are contiguous. The own part is copied unless it
        is the same tensor in both."""
        if receives[self.index] is not sends[self.index]:
            receives[self.index].copy_(sends[self.index])
        self._exchange(sends, receives)

    def rotate(self, send: torch.Tensor, receive: torch.Tensor) -> Callable[[], None]:
        """Start sending to the next rank and receiving from the previous one; returns what waits for both."""
        after, before = (self.index + 1) % self.size, (self.index - 1) % self.size
        if send.numel():
            self._count(send.numel() * send.element_size())
        works = self.group.exchange([(send, after)], [(receive, before)], "rotate")

        def wait() -> None:
            if works:
                yield_while_waiting()
                self.group.wait(works, "rotate", (send, receive))

        return wait

    def _exchange(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]) -> None:
        """P2P between all pairs. gloo has no gather or all-to-all of unequal lists."""
        steps = range(1, self.size)
        out = [(sends[to], to) for to in ((self.index + step) % self.size for step in steps)]
        into = [(receives[source], source) for source in ((self.index - step) % self.size for step in steps)]
        for tensor, _ in out:
            if tensor.numel():
                self._count(tensor.numel() * tensor.element_size())
        works = self.group.exchange(out, into, "exchange")
        if works:
            yield_while_waiting()
            self.group.wait(works, "exchange", (out, into))

    def _count(self, nbytes: int) -> None:
        self.sent_bytes += nbytes
        self.messages += 1


def even_sizes(total: int, parts: int) -> list[int]:
    """Lengths of `parts` runs of `total` things that differ by at most one, the longer ones first."""
    size, left_over = divmod(total, parts)
    return [size + (i < left_over) for i in range(parts)]
