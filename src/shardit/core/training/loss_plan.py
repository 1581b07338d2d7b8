"""Knowledge of the stages about losses of one signature: block calls, segments, tensors that cross each cut."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit.core.plans.call_plan import Address, Site


@dataclass(frozen=True)
class Layout:
    """The layout of a tensor at a handle; nbytes: the size of its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Layout:
        """Describe a tensor."""
        nbytes = tensor.untyped_storage().nbytes()
        return Layout(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), nbytes)

    @property
    def is_whole(self) -> bool:
        """Whether the tensor shows all of its storage."""
        elements = torch.Size(self.size).numel()
        return elements * self.dtype.itemsize == self.nbytes and 0 not in self.stride


@dataclass(frozen=True)
class CutTensor:
    """A tensor that crosses a cut.

    late: the receiver writes it over the content of its own tensor at the cut; else the received tensor is the output
    of the block from the call on. rewritten: code after the cut writes to it. differentiable: a gradient comes back.
    """

    address: Address
    layout: Layout
    late: bool
    rewritten: bool
    differentiable: bool

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions by descending stride: in this order a permuted tensor is contiguous in a message."""
        return tuple(sorted(range(len(self.layout.size)), key=lambda dim: (-self.layout.stride[dim], dim)))

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor to send."""
        # A tensor may require a gradient that no parameter needs: peft asks that of embeddings under checkpointing.
        tensor = tensor if self.differentiable else tensor.detach()
        packed = tensor.permute(self.order).contiguous()
        # The code after the cut may write to the tensor before it is sent.
        return packed.clone() if self.rewritten and packed.data_ptr() == tensor.data_ptr() else packed

    def unpack(self, received: torch.Tensor) -> torch.Tensor:
        """Return the received tensor with the dimensions in their own order."""
        order = self.order
        if order != tuple(range(len(order))):
            received = received.permute([order.index(dim) for dim in range(len(order))])
        if self.rewritten:  # code that writes in place must not meet a leaf of autograd
            return received.clone()
        # Autocast casts a leaf once for all that read it, as a weight: its gradient would be summed in half precision.
        return received.view_as(received)

    def empty(self) -> torch.Tensor:
        """Return a tensor on meta that describes the message."""
        size = [self.layout.size[dim] for dim in self.order]
        return torch.empty(size, dtype=self.layout.dtype, device="meta", requires_grad=self.differentiable)


@dataclass(frozen=True)
class LossPlan:
    """The plan of the losses of one signature. The same on every stage.

    segments: (first, last) call site of each; owners: their stages. cuts[k]: what crosses from segment k to k + 1.
    draws: blocks draw random numbers, so that the states of the generators cross, too. plain_calls: number of calls of
    the model without gradients before the first block call with gradients. state_bytes: sizes of the states.
    """

    sites: tuple[Site, ...]
    segments: tuple[tuple[int, int], ...]
    owners: tuple[int, ...]
    cuts: tuple[tuple[CutTensor, ...], ...]
    draws: bool = False
    plain_calls: int = 0
    state_sizes: tuple[int, ...] = field(default=(), compare=False)

    def messages(self, cut: int) -> tuple[torch.Tensor, ...]:
        """Return tensors on meta that describe what crosses a cut."""
        states = self.state_sizes if self.draws else ()
        return (
            *(item.empty() for item in self.cuts[cut]),
            *(torch.empty(size, dtype=torch.uint8, device="meta") for size in states),
        )

    def digest(self) -> str:
        """Return a hash for the comparison between ranks."""
        text = (tuple(map(_layouts, self.sites)), self.segments, self.owners, self.cuts, self.draws, self.plain_calls)
        return hashlib.sha256(repr(text).encode()).hexdigest()


def _layouts(site: Site) -> tuple[Any, ...]:
    """Return the block of a call site, and the layouts of its tensors: other values may be objects of each rank."""
    given = tuple(one[:2] for one in site.given if isinstance(one, tuple) and isinstance(one[0], torch.dtype))
    out = tuple((leaf.kind, leaf.dtype, leaf.size, leaf.stride, leaf.offset, leaf.arg) for leaf in site.leaves)
    return site.block, given, out
