"""Watching the first call of a signature: who writes which memory, who reads it, and so what has to be carried.

Liveness analysis over storages. Outside blocks every operation is seen by a TorchDispatchMode; a block call counts as
one operation. What derives from a block's output, was written before a cut and is read after it, is carried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import UnsupportedError
from .comm import ALIGN, first_byte, pack_layout
from .plan import (
    Address,
    CallPlan,
    Hop,
    Item,
    Leaf,
    ResultPlan,
    Site,
    segments_of,
    span,
)

# Operations whose result decides what Python does next, or how large the next tensor is.
_HOST = {
    torch.Tag.data_dependent_output: "reads a value on the host",
    torch.Tag.dynamic_output_shape: "makes a shape from values",
}


@dataclass
class Event:
    """One operation outside blocks, or the block call number `after`; `after` block calls had ended when it began.

    derived: it read something that comes from a block (or is a block call), so what it writes exists on one rank only.
    """

    after: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    derived: bool
    block: bool = False


@dataclass
class Trace:
    """What was seen, in order; storages are numbered in order of appearance, the same on every rank.

    handles[storage]: every place where a rank can get hold of it. extent[storage]: (first, last + 1) byte that some
    handle shows. derived: storages whose content comes from a block.
    """

    events: list[Event] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    handles: dict[int, list[Address]] = field(default_factory=dict)
    extent: dict[int, tuple[int, int]] = field(default_factory=dict)
    created: dict[int, int] = field(default_factory=dict)  # storage -> site whose output made it
    derived: set[int] = field(default_factory=set)
    places: dict[Address, int] = field(default_factory=dict)  # byte of its storage at which a handle begins
    inputs: set[int] = field(default_factory=set)
    makers: dict[int, str] = field(default_factory=dict)  # storage that code outside blocks derived -> how
    mutated_input: bool = False
    _numbers: dict[int, int] = field(default_factory=dict)
    # A weak reference keeps the address of a dead storage from being used again, and holds none of its data.
    _refs: list[StorageWeakRef] = field(default_factory=list)

    def number(self, tensor: torch.Tensor) -> int:
        """The number of the storage under a tensor."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = len(self._refs)
            self._refs.append(StorageWeakRef(storage))
        return self._numbers[key]

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the storage under a tensor was seen before."""
        return tensor.untyped_storage()._cdata in self._numbers

    def operation(self, name: str, reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor]) -> None:
        """Record an operation outside blocks."""
        read = tuple(dict.fromkeys(self.number(t) for t in reads))
        shapes = {self.number(t): tuple(t.shape) for t in writes}
        written = tuple(shapes)
        derived = any(s in self.derived for s in read)
        if derived:
            self.derived.update(written)
            for storage, shape in shapes.items():
                self.makers.setdefault(storage, f"{name}, shape {shape}, after block call {len(self.sites) - 1}")
        self.mutated_input |= any(s in self.inputs for s in written)
        self.events.append(Event(len(self.sites), read, written, derived))

    def block(self, site: Site, arguments: list[torch.Tensor | None], outputs: list[Any], mutated: list[int]) -> None:
        """Record call site number len(sites): argument leaves (None where not a tensor), output leaves, and the
        argument leaves that the block wrote to."""
        n = len(self.sites)
        read = [self.number(t) for t in arguments if t is not None]
        for q, tensor in enumerate(arguments):
            if tensor is not None:
                self._handle(Address(n, "arg", q), tensor)
        written = [self.number(t) for q in mutated if (t := arguments[q]) is not None]
        for q, (leaf, value) in enumerate(zip(site.leaves, outputs, strict=True)):
            if leaf.kind == "tensor":
                number = self.number(value)
                self.created.setdefault(number, n)
                written.append(number)
            if leaf.kind != "value":
                self._handle(Address(n, "out", q), value)
        self.mutated_input |= any(s in self.inputs for s in written)
        self.derived.update(written)
        self.sites.append(site)
        self.events.append(Event(n, tuple(dict.fromkeys(read)), tuple(dict.fromkeys(written)), True, True))

    def _handle(self, address: Address, tensor: torch.Tensor) -> None:
        number = self.number(tensor)
        self.handles.setdefault(number, []).append(address)
        self.places[address] = first_byte(tensor)
        if number not in self.created:  # other views of it may show more than this one
            self.extent[number] = (0, tensor.untyped_storage().nbytes())
            return
        start = first_byte(tensor)
        end = start + span(tuple(tensor.shape), tuple(tensor.stride())) * tensor.element_size()
        low, high = self.extent.get(number, (start, end))
        self.extent[number] = (min(low, start), max(high, end))


class Recorder(TorchDispatchMode):
    """Writes every operation outside blocks into a `Trace`. `paused` while a block runs.

    `fetch` gives a tensor that an operation may read in place of the one it was given, which may be on meta.
    """

    def __init__(self, trace: Trace, fetch: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.supports_higher_order_operators = True  # flex attention, for one
        self.trace = trace
        self.fetch = fetch
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, self.fetch, (args, kwargs))
        reads = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self._check(func, reads, args)
        out = func(*args, **kwargs)
        seen = {t.untyped_storage()._cdata for t in reads}
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            written = [a for a, spec in zip(args, func._schema.arguments, strict=False) if _writes(spec)]
            written += [kwargs[s.name] for s in func._schema.arguments if _writes(s) and s.name in kwargs]
            written = [t for t in tree_leaves(written) if isinstance(t, torch.Tensor)]
            self.trace.operation(str(func), reads, written + outputs)
        else:
            fresh = [t for t in outputs if t.untyped_storage()._cdata not in seen]
            if fresh or not outputs:  # what is left out are views: they read no data
                self.trace.operation(str(func), reads, fresh)
        return out

    def _check(self, func: Any, reads: list[torch.Tensor], args: tuple[Any, ...]) -> None:
        if any(tensor.is_meta for tensor in reads):
            raise UnsupportedError(
                f"code outside the blocks reads data of a block that another rank has ({func}); "
                "name its parameters in Plan(replicate=...)"
            )
        for tag, what in _HOST.items():
            if tag in getattr(func, "tags", ()) and any(
                self.trace.knows(t) and self.trace.number(t) in self.trace.derived for t in _deciding(func, reads, args)
            ):
                raise UnsupportedError(
                    f"the forward {what} ({func}) that comes from a block, so its course cannot be known on every rank"
                )


def _deciding(func: Any, reads: list[torch.Tensor], args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors whose values decide how large the result is: of indexing only the masks among the indices."""
    if func is torch.ops.aten.index.Tensor:
        return [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    return reads


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def derive(trace: Trace, result: list[Any], result_spec: Any, result_leaves: tuple[Leaf, ...]) -> CallPlan:
    """The plan of a call that was watched. Raises UnsupportedError where something to be carried has no handle."""
    owners = [site.owner for site in trace.sites]
    segments = segments_of(owners)
    segment_of = [k for k, (first, last) in enumerate(segments) for _ in range(first, last + 1)]
    seg_owner = [owners[first] for first, _ in segments]
    last = len(segments) - 1
    end = Event(len(trace.sites), tuple(trace.number(t) for t in result if isinstance(t, torch.Tensor)), (), False)
    carried: list[dict[int, None]] = [{} for _ in range(last)]  # per hop, storages in a stable order
    holders: dict[int, dict[int, int]] = {}  # storage -> {stage: first segment at which it has the current content}
    rewritten: dict[int, list[int]] = {}  # storage -> segments of all writes
    for event in [*trace.events, end]:
        segment = _segment(event, segment_of, last)
        for storage in event.reads:
            if storage in holders:
                _bring(storage, segment, seg_owner, holders[storage], carried)
        for storage in event.writes if event.derived else ():
            holders[storage] = {seg_owner[segment]: segment}
            rewritten.setdefault(storage, []).append(segment)
    hops = _hops(trace, segments, seg_owner, carried, rewritten)
    out = ResultPlan.of(result_spec, result_leaves)
    return CallPlan(tuple(trace.sites), tuple(segments), tuple(seg_owner), hops, out)


def _segment(event: Event, segment_of: list[int], last: int) -> int:
    """The segment in which an event takes effect; -1 for the prologue, which every rank runs.

    Code after block call n - 1 runs, for good, on the owner of block call n, which has received what it needs.
    """
    if event.after == 0 and not event.block:
        return -1
    return segment_of[event.after] if event.after < len(segment_of) else last


def _bring(storage: int, segment: int, owner: list[int], held: dict[int, int], carried: list[dict[int, None]]) -> None:
    """Let the owner of `segment` have the content, through the chain, from the nearest stage that has it."""
    k = segment
    while not (owner[k] in held and held[owner[k]] <= k):
        held[owner[k]] = k
        carried[k - 1][storage] = None
        k -= 1


def _hops(
    trace: Trace,
    segments: list[tuple[int, int]],
    owner: list[int],
    carried: list[dict[int, None]],
    rewritten: dict[int, list[int]],
) -> tuple[Hop, ...]:
    received: dict[tuple[int, int], bool] = {}  # (storage, stage) -> the stage's placeholder was filled before
    hops = []
    for k, storages in enumerate(carried):
        last_site, items = segments[k][1], []
        for storage in sorted(storages):
            address = _address(trace, storage, last_site)
            start, stop = trace.extent[storage]
            start -= start % ALIGN  # some CPU kernels give other last bits for memory aligned in another way
            target = owner[k + 1]
            fresh = (
                address.kind == "out"
                and trace.created.get(storage) == address.site
                and trace.sites[address.site].owner != target
                and (storage, target) not in received
            )
            received[(storage, target)] = True
            # The sender's memory may be sent as it lies only if nobody writes to it any more.
            copy = any(segment > k for segment in rewritten.get(storage, ()))
            items.append(Item(address, start - trace.places[address], stop - start, fresh, copy))
        hops.append(Hop(owner[k], owner[k + 1], tuple(items), pack_layout(tuple(i.size for i in items))))
    return tuple(hops)


def _address(trace: Trace, storage: int, last_site: int) -> Address:
    """A handle of the storage that exists before the hop: where it was made if possible, else the first one."""
    handles = [a for a in trace.handles.get(storage, ()) if a.site <= last_site]
    if not handles:
        raise UnsupportedError(
            f"a tensor that code outside the blocks computes from a block's output ({trace.makers.get(storage)}) is "
            "needed in a later stage, but is never an argument or an output of a block, so it cannot be carried; "
            "where another list of blocks makes it, name only the main lists in Plan(order=...): lists left out are "
            "not cut"
        )
    created = trace.created.get(storage)
    for address in handles:
        if address.kind == "out" and address.site == created:
            return address
    return handles[0]
