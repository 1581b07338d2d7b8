"""The result of a call: pending tensors over one buffer, and the way it takes to every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from shardit.core.comm.mesh import Mesh
from shardit.core.comm.p2p import Comm, Transfer
from shardit.core.comm.wire import message_memory, view_bytes
from shardit.core.plans.call_plan import ResultPlan
from shardit.core.runtime.pending import PendingSource


@dataclass(frozen=True)
class Route:
    """Route of results: `comm` joins all ranks of a replica of the data axis, and `members[c][s]` is the member that
    has stage s of guidance replica c, at this rank's own place on every other axis."""

    comm: Comm
    members: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(mesh: Mesh, comm: Comm) -> Route:
        """Return the route of this rank."""
        stages = range(mesh.pp_size)
        return Route(comm, tuple(tuple(mesh.member(cfg=c, pp=s) for s in stages) for c in range(mesh.sizes["cfg"])))

    def of_one(self, replica: int) -> Route:
        """Return the route of a call that every guidance replica runs for itself."""
        return Route(self.comm, tuple(m if c == replica else () for c, m in enumerate(self.members)))

    def send(self, message: torch.Tensor) -> None:
        """From the rank of the last stage: send a result to all others."""
        for member in (m for replica in self.members for m in replica if m != self.comm.rank):
            self.comm.send(message, member, result=True)

    def receive(self, replica: int, stage: int, message: torch.Tensor) -> Transfer:
        """Post the receive of a result."""
        return self.comm.receive(message, self.members[replica][stage], result=True)


class Result:
    """Result of a call. The call fills or receives its buffer before `materialize` returns."""

    def __init__(self, plan: ResultPlan, device: torch.device, materialize: Callable[[], None]):
        self.plan = plan
        # NaN until it is here: torch.tensor and its like look at a tensor's memory without asking the tensor.
        self.memory = message_memory(plan.layout.total, device).fill_(0xFF)
        self.source = PendingSource(materialize)

    def tree(self) -> Any:
        """Return the value that the caller gets."""
        leaves = [leaf.value for leaf in self.plan.leaves]
        for number, tensor in self.views():
            leaves[number] = self.source.wrap(tensor)
        return tree_unflatten(leaves, self.plan.spec)

    def views(self) -> list[tuple[int, torch.Tensor]]:
        """(number of the leaf, tensor over the buffer) for every tensor of the result."""
        views = []
        for number, (start, _) in zip(self.plan.parts, self.plan.layout.parts, strict=True):
            leaf = self.plan.leaves[number]
            assert leaf.dtype is not None
            views.append((number, view_bytes(self.memory, start, leaf.dtype, leaf.size, leaf.stride)))
        return views
