"""Settings of a user for one model (`Plan`), and the messages of one call of it (`CallPlan`)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit.core.comm.wire import MessageLayout, pack_layout, span


@dataclass(frozen=True)
class Leaf:
    """One leaf of a block's output or of a forward's result.

    kind: "tensor" (a tensor with memory of its own, number `storage` among the new ones of this call site),
        "arg" (a view of, or the same object as, the tensor leaf number `arg` of the call's arguments), or
        "value" (anything that is not a tensor, passed as it is).
    offset is in elements of the storage, for "arg" in bytes from the first element of the argument (which may lie
    elsewhere in its storage on another rank); nbytes is the size of the storage.
    """

    kind: str
    dtype: torch.dtype | None = None
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    storage: int = -1
    arg: int = -1
    same: bool = False
    value: Any = None
    nbytes: int = 0


def describe_result(leaf: Any) -> Leaf:
    """Describe one leaf of the result of a forward."""
    if not isinstance(leaf, torch.Tensor):
        return Leaf("value", value=leaf)
    return Leaf("tensor", leaf.dtype, tuple(leaf.shape), tuple(leaf.stride()))


@dataclass(frozen=True)
class Site:
    """The n-th block call of a forward: the block and the layout of its output.

    given: `describe_leaf` of each argument leaf. mutated: argument leaves that the block writes to.
    """

    block: int
    owner: int
    spec: Any = field(compare=False)
    leaves: tuple[Leaf, ...] = ()
    given: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    mutated: tuple[int, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Address:
    """A handle that exists on every rank: output leaf or argument leaf number `leaf` of call site `site`."""

    site: int
    kind: str  # "out" or "arg"
    leaf: int


@dataclass(frozen=True)
class HopItem:
    """One storage that crosses a hop: its address, its range of bytes, and whether the sender must copy it.

    start, size: the range of bytes, counted from the first element of the tensor at `address`: on a receiver that
    tensor may lie in the middle of a message. fresh: on the receiver this is the first content of a storage behind a
    placeholder, so that the placeholder can lie in the message itself. taken, placed: the call sites at whose exit the
    sender has the content in its memory, and the receiver needs it; for both the last one of the hop's segment, unless
    code before that writes to the memory or runs again on it.
    """

    address: Address
    start: int
    size: int
    fresh: bool
    copy: bool
    taken: int
    placed: int


@dataclass(frozen=True)
class Hop:
    """One message from the owner of a segment to the owner of the next. The receiver waits for it at the exit of call
    site `pause`: the last one of the segment, unless code before that runs again on the received data."""

    source: int
    target: int
    items: tuple[HopItem, ...]
    layout: MessageLayout
    pause: int


@dataclass(frozen=True)
class ResultPlan:
    """The result of a forward: its leaves, and one message with all tensors among them, dense, in leaf order; parts[i]
    is the number of the leaf in part i of the message."""

    spec: Any = field(compare=False)
    leaves: tuple[Leaf, ...]
    layout: MessageLayout
    parts: tuple[int, ...]

    @staticmethod
    def of(spec: Any, leaves: tuple[Leaf, ...]) -> ResultPlan:
        """Lay out the message."""
        numbers = tuple(i for i, leaf in enumerate(leaves) if leaf.kind == "tensor")
        layout = pack_layout(tuple(span_bytes(leaves[i]) for i in numbers))
        return ResultPlan(spec, leaves, layout, numbers)


@dataclass(frozen=True)
class CallPlan:
    """The whole description of calls with one signature, without data. The same on every rank.

    sites: all block calls in order. segments: (first site, last site) of each maximal run of sites with one owner.
    hops[k]: the message between segments k and k + 1. result: the return value of the forward.
    """

    sites: tuple[Site, ...]
    segments: tuple[tuple[int, int], ...]
    owners: tuple[int, ...]
    hops: tuple[Hop, ...]
    result: ResultPlan

    @property
    def path(self) -> tuple[Any, ...]:
        """Return the sequence of block calls and of carried storages, regardless of their sizes."""
        carried = tuple(tuple(item.address for item in hop.items) for hop in self.hops)
        return tuple(site.block for site in self.sites), carried

    def digest(self) -> str:
        """Return a hash of the plan for comparison between ranks."""
        text = repr((self.sites, self.segments, self.owners, self.hops, self.result.leaves, self.result.layout))
        return hashlib.sha256(text.encode()).hexdigest()


def segments_of(owners: list[int]) -> list[tuple[int, int]]:
    """Return the maximal runs of equal owners as (first, last) site numbers."""
    out: list[tuple[int, int]] = []
    for n, owner in enumerate(owners):
        if out and owners[out[-1][0]] == owner:
            out[-1] = (out[-1][0], n)
        else:
            out.append((n, n))
    return out


def span_bytes(leaf: Leaf) -> int:
    """Return the bytes from the first to the last element of a tensor leaf."""
    return span(leaf.size, leaf.stride) * torch.empty(0, dtype=leaf.dtype).element_size()
