"""Messages of device tensors through host memory: for devices that cannot send to each other, and for ranks that share
one device, which NCCL refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(eq=False)
class HostWork:
    """A message in flight. into: the device tensors that are filled from `hosts` when it has arrived."""

    work: Any
    hosts: list[torch.Tensor]
    into: Sequence[torch.Tensor] = ()

    def wait(self, *timeout: Any) -> Any:
        """Wait for the message, and start the copies to the device on the current stream."""
        done = self.work.wait(*timeout)
        for tensor, host in zip(self.into, self.hosts, strict=True) if self.into else ():
            tensor.copy_(host, non_blocking=True)
        self.into = ()
        return done


@dataclass(frozen=True, eq=False)
class HostGroup:
    """A gloo group that takes tensors of a device, with the methods of torch's ProcessGroup that the groups use. Lists
    have one tensor."""

    group: dist.ProcessGroup

    def send(self, tensors: list[torch.Tensor], place: int, tag: int) -> HostWork:
        """Start sending to a place of the group."""
        hosts = _copies(tensors)
        return HostWork(dist.isend(hosts[0], group=self.group, group_dst=place, tag=tag), hosts)

    def recv(self, tensors: list[torch.Tensor], place: int, tag: int) -> HostWork:
        """Start receiving from a place of the group; `wait` fills the tensors."""
        hosts = list(map(_blank, tensors))
        return HostWork(dist.irecv(hosts[0], group=self.group, group_src=place, tag=tag), hosts, tensors)

    def allreduce(self, tensors: list[torch.Tensor]) -> HostWork:
        """Start a sum over all ranks, in place."""
        hosts = _copies(tensors)
        return HostWork(dist.all_reduce(hosts[0], group=self.group, async_op=True), hosts, tensors)

    def allgather(self, parts: list[list[torch.Tensor]], tensors: list[torch.Tensor]) -> HostWork:
        """Start gathering the tensors of all ranks into `parts`."""
        hosts = list(map(_blank, parts[0]))
        work = dist.all_gather(hosts, _copies(tensors)[0], group=self.group, async_op=True)
        return HostWork(work, hosts, parts[0])

    def broadcast(self, tensor: torch.Tensor, root: int) -> HostWork:
        """Start a broadcast from a place of the group, in place."""
        is_root = dist.get_rank(self.group) == root
        hosts = _copies([tensor]) if is_root else [_blank(tensor)]
        work = dist.broadcast(hosts[0], group=self.group, group_src=root, async_op=True)
        return HostWork(work, hosts, () if is_root else [tensor])


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return host copies, complete: gloo reads them at once."""
    hosts = [_blank(tensor).copy_(tensor, non_blocking=True) for tensor in tensors]
    if any(tensor.device.type == "cuda" for tensor in tensors):
        torch.cuda.current_stream().synchronize()
    return hosts
