"""Messages between the stages of a decoder, in the order of the program that all ranks run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shardit.core.comm.p2p import Comm, Transfer
from shardit.core.comm.wire import ALIGN, first_byte, span, storage_bytes, view_bytes
from shardit.core.runtime.pending import Source


class Link:
    """Sends and receives tensors of which all ranks know the shape.

    pause: called before a rank waits for a message, so that other programs of this rank can compute meanwhile.
    """

    def __init__(self, comm: Comm, pause: Callable[[], None] = lambda: None):
        self.comm, self.rank, self.size, self.device = comm, comm.rank, comm.size, comm.group.device
        self.everyone = frozenset(range(comm.size))
        self._pause = pause

    def send(self, tensor: torch.Tensor, ranks: frozenset[int], later: bool = False) -> None:
        """Send a tensor to some ranks; does not wait. It may be written to afterwards. later: for `receive_later`."""
        message = tensor.detach().clone(memory_format=torch.contiguous_format)
        flat = storage_bytes(message, 0, message.numel() * message.element_size())
        if flat.numel():
            for rank in sorted(ranks):
                self.comm.send(flat, rank, result=later)

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor that a rank sends, with the strides of `like`. Waits."""
        message, transfer = self._post(like, source, later=False)
        self._pause()
        self._take(transfer)
        return strided_as(like, message)

    def receive_later(self, like: torch.Tensor, source: int) -> torch.Tensor:
        """A pending tensor: what a rank sends, contiguous."""
        message, transfer = self._post(like, source, later=True)

        def settle() -> None:
            self._pause()
            self._take(transfer)

        return Source(settle).wrap(message)

    def _post(self, like: torch.Tensor, source: int, later: bool) -> tuple[torch.Tensor, Transfer | None]:
        message = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        flat = storage_bytes(message, 0, message.numel() * message.element_size())
        return message, self.comm.receive(flat, source, result=later) if flat.numel() else None

    def _take(self, transfer: Transfer | None) -> None:
        """Wait for a message. Its sender has taken what this rank sent before, so that memory can go."""
        if transfer is not None:
            self.comm.wait(transfer)


def strided_as(like: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor with the strides and the alignment of another: kernels give other last bits for memory that
    is laid out or aligned in another way."""
    skew = first_byte(like) % ALIGN
    if skew == 0 and message.stride() == like.stride():
        return message
    size, stride = tuple(like.shape), like.stride()
    memory = torch.empty(skew + span(size, stride) * like.element_size(), dtype=torch.uint8, device=message.device)
    return view_bytes(memory, skew, like.dtype, size, stride).copy_(message)
