"""Data that one call carries over its cuts: memory that a hop reads or fills, and the messages of hops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardit.core.comm.p2p import Comm, Transfer
from shardit.core.comm.wire import first_byte, message_memory, storage_bytes, view_bytes
from shardit.core.plans.call_plan import Address, HopItem, Leaf
from shardit.core.plans.local_plan import LocalPlan
from shardit.core.plans.stand_ins import blank, is_float


class CarriedTensors:
    """The part of one rank. poison: NaN in all memory that has not been filled."""

    def __init__(self, local: LocalPlan, comm: Comm, poison: bool):
        self.local, self.comm, self.hops = local, comm, local.plan.hops
        self._poison, self._device = poison, comm.group.device
        self._handles: dict[Address, torch.Tensor] = {}
        self._messages: dict[int, torch.Tensor] = {}
        self._copies: dict[tuple[int, int], torch.Tensor] = {}  # (hop, item) -> what is sent, though written to since
        self._receives: dict[int, Transfer] = {}
        self._sent: set[int] = set()
        self._sends: list[Transfer] = []

    def keep(self, kind: str, n: int, numbers: Sequence[int], leaves: Sequence[Any]) -> None:
        """Remember tensors among the arguments ("arg") or outputs ("out") of call site n, which hops read or fill."""
        for number in numbers:
            self._handles[Address(n, kind, number)] = leaves[number]

    def placeholder(self, n: int, leaf: Leaf) -> tuple[torch.Tensor, int]:
        """Memory for a new storage of an unowned block, and the byte of the storage at which it starts."""
        where = self.local.fresh.get((n, leaf.storage))
        if where is not None:
            k, item, start = where
            offset, size = self.hops[k].layout.parts[item]
            return self._message(k)[offset : offset + size], start
        return self._blank(leaf), 0

    def unread(self, leaf: Leaf) -> torch.Tensor:
        """Return the only output of an unowned block, which fills a storage that no hop reads or fills."""
        if self._poison or not is_float(leaf):
            assert leaf.dtype is not None
            return view_bytes(self._blank(leaf), 0, leaf.dtype, leaf.size, leaf.stride)
        return torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype, device=self._device)

    def _blank(self, leaf: Leaf) -> torch.Tensor:
        memory = blank(leaf, self._device)
        return memory.fill_(0xFF) if self._poison and is_float(leaf) else memory

    def place(self, n: int) -> None:
        """At the exit of call site n: put in place what came, copy what is sent later."""
        for k, i in self.local.places.get(n, ()):
            message, (offset, size) = self._messages.get(k), self.hops[k].layout.parts[i]
            if message is not None:  # it is not empty
                self._memory(self.hops[k].items[i]).copy_(message[offset : offset + size])
        for k, i in self.local.copies.get(n, ()):
            self._copies[k, i] = self._memory(self.hops[k].items[i]).clone()

    def post(self, k: int) -> None:
        """Post the receive of hop k."""
        if self.hops[k].layout.total:
            self._receives[k] = self.comm.receive(self._message(k), self.hops[k].source)

    def arrive(self, k: int) -> None:
        """Wait for hop k, if this rank has posted its receive."""
        receive = self._receives.pop(k, None)
        if receive is not None:
            self.take(receive)

    def take(self, receive: Transfer) -> None:
        """Wait for a message. What this rank sent before was taken on its way here, so its memory can go."""
        self.comm.wait(receive)
        for send in self._sends:
            self.comm.wait(send)
        self._sends.clear()

    def send(self, k: int) -> None:
        """Send hop k, if this is its source."""
        hop = self.hops[k]
        if hop.source != self.local.rank or not hop.layout.total:
            return
        kept = [self._copies.pop((k, i), None) for i in range(len(hop.items))]
        sources = [self._memory(item) if copy is None else copy for item, copy in zip(hop.items, kept, strict=True)]
        message = sources[0]
        if len(sources) > 1 or (hop.items[0].copy and kept[0] is None):
            message = torch.empty(hop.layout.total, dtype=torch.uint8, device=self._device)
            for source, (offset, size) in zip(sources, hop.layout.parts, strict=True):
                message[offset : offset + size].copy_(source)
        self._sends.append(self.comm.send(message, hop.target))
        self._sent.add(k)

    def send_nothing(self, k: int) -> None:
        """After a failure: send zeros in place of hop k, so that its target does not wait."""
        hop = self.hops[k]
        if hop.source == self.local.rank and k not in self._sent and hop.layout.total:
            self.comm.send(torch.zeros(hop.layout.total, dtype=torch.uint8, device=self._device), hop.target)

    def release(self, k: int) -> None:
        """Forget hop k, and what no later hop needs."""
        self._messages.pop(k, None)
        for address in self.local.release.get(k, ()):
            self._handles.pop(address, None)

    def clear(self) -> None:
        """Forget all memory."""
        self._handles.clear()

    def _message(self, k: int) -> torch.Tensor:
        if k not in self._messages:
            message = message_memory(self.hops[k].layout.total, self._device)
            self._messages[k] = message.fill_(0xFF) if self._poison else message  # all ones is a NaN in every format
            for offset, size in self.local.integers.get(k, ()):
                message[offset : offset + size].zero_()
        return self._messages[k]

    def _memory(self, item: HopItem) -> torch.Tensor:
        handle = self._handles[item.address]
        return storage_bytes(handle, first_byte(handle) + item.start, item.size)
