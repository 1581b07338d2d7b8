"""Traces the first call of a signature: the memory that each operation outside blocks reads and writes.

A TorchDispatchMode sees every operation outside blocks; a block call counts as one operation. `derive` computes the
data to carry from this trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from shardit.core.comm.wire import first_byte, span
from shardit.core.plans.call_plan import Address, Site
from shardit.core.runtime.storages import Origins, storage_key, tensors_of, written
from shardit.errors import UnsupportedError

HOST = {
    torch.Tag.data_dependent_output: "reads a value on the host",
    torch.Tag.dynamic_output_shape: "makes a shape from values",
}
"""Operations whose result decides the next step of Python code, or the size of the next tensor."""


@dataclass
class Event:
    """One operation outside blocks, or the block call number `after`; `after` block calls had ended when it began.

    derived: it read data derived from a block (or is a block call), so its output exists on one rank only.
    """

    after: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    derived: bool
    block: bool = False


@dataclass
class Trace:
    """The events of a forward, in order; storages are numbered in order of appearance, the same on every rank.

    handles[storage]: every place at which a rank can access it. extent[storage]: (first, last + 1) byte that some
    handle shows. derived: storages whose content comes from a block.
    """

    events: list[Event] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    handles: dict[int, list[Address]] = field(default_factory=dict)
    extent: dict[int, tuple[int, int]] = field(default_factory=dict)
    created: dict[int, int] = field(default_factory=dict)  # storage -> site that returned it
    derived: set[int] = field(default_factory=set)
    places: dict[Address, int] = field(default_factory=dict)  # byte of its storage at which a handle begins
    inputs: set[int] = field(default_factory=set)
    makers: dict[int, str] = field(default_factory=dict)  # storage derived by code outside blocks -> operation
    mutated_input: bool = False
    deciding: set[int] = field(default_factory=set)  # argument leaves whose values Python has read
    _origins: Origins = field(default_factory=Origins)  # the argument leaves that storages were made from

    def begin(self, arguments: Iterable[Any]) -> None:
        """Register the argument leaves of the forward."""
        for q, leaf in enumerate(arguments):
            if isinstance(leaf, torch.Tensor):
                self.inputs.add(self.number(leaf))
                self._origins.add(leaf, (q,))

    def decides(self, tensor: torch.Tensor) -> None:
        """Record that Python has read values of a tensor."""
        if self.knows(tensor) and self.number(tensor) not in self.derived:
            self.deciding |= self._origins.of([tensor])

    def reads_on_host(self, what: str) -> None:
        """Handle values derived from a block that decide what code outside blocks does next."""
        raise UnsupportedError(
            f"the forward {what} that comes from a block, so its control flow cannot be known on every rank"
        )

    def number(self, tensor: torch.Tensor) -> int:
        """Return the number of the storage under a tensor."""
        return self._origins.number(tensor)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Return whether the storage under a tensor was seen before."""
        return tensor in self._origins

    def operation(self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """Record an operation outside blocks."""
        read = tuple(dict.fromkeys(self.number(t) for t in reads))
        shapes = {self.number(t): tuple(t.shape) for t in writes}
        written = tuple(shapes)
        derived = any(s in self.derived for s in read)
        if derived:
            self.derived.update(written)
            for storage, shape in shapes.items():
                self.makers.setdefault(storage, f"{name}, shape {shape}, after block call {len(self.sites) - 1}")
        self._origins.derive(writes, reads)
        self.mutated_input |= any(s in self.inputs for s in written)
        self.events.append(Event(len(self.sites), read, written, derived))

    def block(self, site: Site, arguments: Sequence[Any], outputs: list[Any], mutated: list[int]) -> None:
        """Record call site number len(sites): argument leaves, output leaves, and the numbers of the argument leaves
        that the block wrote to."""
        n = len(self.sites)
        tensors = {q: leaf for q, leaf in enumerate(arguments) if isinstance(leaf, torch.Tensor)}
        read = [self.number(tensor) for tensor in tensors.values()]
        for q, tensor in tensors.items():
            self._handle(Address(n, "arg", q), tensor)
        written = [self.number(tensors[q]) for q in mutated if q in tensors]
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

    fetch: returns the tensor to read in place of an operation's argument, which may be on meta.
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
        reads = tensors_of((args, kwargs))
        self._check(func, reads, args)
        out = func(*args, **kwargs)
        outputs = tensors_of(out)
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            self.trace.operation(str(func), reads, written(func, args, kwargs) + outputs)
        else:
            seen = set(map(storage_key, reads))
            fresh = [t for t in outputs if storage_key(t) not in seen]
            if fresh or not outputs:  # views are left out: they read no data
                self.trace.operation(str(func), reads, fresh)
        return out

    def _check(self, func: Any, reads: list[torch.Tensor], args: tuple[Any, ...]) -> None:
        if any(tensor.is_meta for tensor in reads):
            raise UnsupportedError(
                f"code outside the blocks reads data of a block that another rank has ({func}); "
                "name its parameters in Plan(replicate=...)"
            )
        for tag, what in HOST.items():
            if tag not in getattr(func, "tags", ()):
                continue
            for tensor in deciding(func, reads, args):
                if self.trace.knows(tensor) and self.trace.number(tensor) in self.trace.derived:
                    self.trace.reads_on_host(f"{what} ({func})")
                self.trace.decides(tensor)


def deciding(func: Any, reads: list[torch.Tensor], args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Return the tensors whose values an operation of `HOST` reads: for indexing only the masks among the indices."""
    if func is torch.ops.aten.index.Tensor:
        return [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    return reads


_READS = frozenset(
    (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__)
)  # these give tensor values to Python without an operation


class HostReads(TorchFunctionMode):
    """Reports to `decides` each tensor whose values Python reads without an operation."""

    def __init__(self, decides: Callable[[torch.Tensor], None]):
        super().__init__()
        self.decides = decides

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self.decides(args[0])
        return func(*args, **(kwargs or {}))


class TraceContext:
    """Context manager that records the operations of a forward outside blocks in a `Trace`. `fetch` is as for
    `Recorder`."""

    def __init__(self, trace: Trace, fetch: Callable[[torch.Tensor], torch.Tensor]):
        self.recorder = Recorder(trace, fetch)
        self._reads = HostReads(trace.decides)

    def __enter__(self) -> None:
        self._reads.__enter__()
        self.recorder.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.recorder.__exit__(*error)
        self._reads.__exit__(*error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the recording while a block runs, or other code that is not part of the forward."""
        modes = list(_get_current_function_mode_stack())
        self.recorder.paused = True
        _set_function_modes([mode for mode in modes if mode is not self._reads])
        try:
            yield
        finally:
            _set_function_modes(modes)
            self.recorder.paused = False


def _set_function_modes(modes: list[Any]) -> None:
    for _ in list(_get_current_function_mode_stack()):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
