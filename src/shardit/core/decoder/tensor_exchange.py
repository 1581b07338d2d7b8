"""Messages between the stages of a decoder, in the order of the programs that all ranks run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shardit.core.comm.p2p import Comm, Transfer
from shardit.core.comm.wire import ALIGN, first_byte, span, storage_bytes, view_bytes
from shardit.core.runtime.pending import PendingSource


class TensorExchange:
    """Sends and receives tensors of which all ranks know the shape.

    others_turn: called after each message, on every rank whether it takes part or not: programs that run at the same
    time take turns there. So all ranks are in the same order at the same messages, and while a message is under way
    others compute.
    """

    def __init__(self, comm: Comm, others_turn: Callable[[], None] = lambda: None):
        self.comm, self.rank, self.size, self.device = comm, comm.rank, comm.size, comm.group.device
        self.everyone = frozenset(range(comm.size))
        self._others_turn = others_turn

    def move(self, tensors: Sequence[tuple[torch.Tensor, int, frozenset[int]]]) -> list[torch.Tensor]:
        """Send tensors from one rank each to others. (tensor, source, targets): on targets a tensor on meta, in whose
        place the data comes, with the same strides. Every rank calls this alike. Waits for what comes."""
        coming: dict[int, tuple[torch.Tensor, Transfer | None]] = {}
        for number, (tensor, source, targets) in enumerate(tensors):
            if self.rank == source:
                self._send(tensor, targets)
            elif self.rank in targets:
                coming[number] = self._post(tensor, source)
        self._others_turn()
        out = [tensor for tensor, _, _ in tensors]
        for number, (message, transfer) in coming.items():
            self._receive(transfer)
            out[number] = strided_as(out[number], message)
        return out

    def share(self, tensor: torch.Tensor, holders: frozenset[int]) -> torch.Tensor:
        """Return a small tensor that some ranks have (on others: one on meta), for all; pending on those that get
        it."""
        source = min(holders)
        if self.rank in holders:
            if self.rank == source:
                self._send(tensor, self.everyone - holders, pending=True)
            self._others_turn()
            return tensor
        message, transfer = self._post(tensor, source, pending=True)
        self._others_turn()
        return PendingSource(lambda: self._receive(transfer)).wrap(message)

    def _send(self, tensor: torch.Tensor, ranks: frozenset[int], pending: bool = False) -> None:
        message = tensor.detach().clone(memory_format=torch.contiguous_format)  # it may be written to
        flat = storage_bytes(message, 0, message.numel() * message.element_size())
        for rank in sorted(ranks) if flat.numel() else ():
            self.comm.send(flat, rank, result=pending)

    def _post(self, like: torch.Tensor, source: int, pending: bool = False) -> tuple[torch.Tensor, Transfer | None]:
        message = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        flat = storage_bytes(message, 0, message.numel() * message.element_size())
        return message, self.comm.receive(flat, source, result=pending) if flat.numel() else None

    def _receive(self, transfer: Transfer | None) -> None:
        if transfer is not None:
            self.comm.wait(transfer)


def strided_as(like: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor with the strides and the alignment of another: kernels give other last bits for memory
    that is laid out or aligned in another way."""
    skew = first_byte(like) % ALIGN
    if skew == 0 and message.stride() == like.stride():
        return message
    size, stride = tuple(like.shape), like.stride()
    memory = torch.empty(skew + span(size, stride) * like.element_size(), dtype=torch.uint8, device=message.device)
    return view_bytes(memory, skew, like.dtype, size, stride).copy_(message)
