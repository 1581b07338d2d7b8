"""Components owned by one rank (text encoders, VAE): other ranks receive their outputs, not their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from shardit.core.comm.barrier import sendable
from shardit.core.comm.p2p import Comm
from shardit.core.comm.wire import (
    ALIGN,
    dump_with_tensors,
    first_byte,
    load_with_tensors,
    span,
    storage_bytes,
    view_bytes,
)
from shardit.core.components.boundary import Boundary, Read, Turn, unbound
from shardit.core.components.containers import Changes, Containers
from shardit.core.modules.attributes import Attributes, Found
from shardit.core.modules.patching import set_tensor
from shardit.core.modules.small_tensors import ReplicatedTensors
from shardit.core.runtime.pending import PendingSource, PendingTensor, materialize
from shardit.core.runtime.randomness import Generator, generators_in, moved, set_states, states
from shardit.core.runtime.versions import changed, mark
from shardit.errors import UnsupportedError


def make_owned(
    module: nn.Module,
    comm: Comm,
    stage: int,
    replicated: Collection[str] = (),
    cut: Collection[str] = (),
    shared: Collection[int] = (),
    turn: Turn = unbound,
) -> None:
    """Make `stage` the only owner of a component, in place: other stages keep its shapes on meta and get its outputs.

    Each tensor of an output is broadcast when the program first uses it, at the same point on every rank. Unused
    tensors (hidden states of all layers, say) are never sent. The same applies to parameters and buffers that code
    outside reads, except those that every rank has (`replicated`). `cut`: parameters of which the stage holds a slice;
    reading one from outside raises UnsupportedError. `shared`: ids of the tensors that another component also has;
    every rank keeps them. `turn`: see Boundary.
    """
    if comm.rank != stage:
        empty(module, replicated, shared)
    small = ReplicatedTensors(module, replicated)
    attributes = Attributes(lambda: boundary.reached)
    boundary = Boundary(
        comm.group.device,
        lambda path, name, function, args, kwargs: run_on(comm, stage, function, args, kwargs, small, attributes),
        reader(module, comm, stage, small, cut),
        turn=turn,
    )
    boundary.install(module, "")


def reader(module: nn.Module, comm: Comm, stage: int, small: ReplicatedTensors, cut: Collection[str] = ()) -> Read:
    """Return the function that gives code outside of an owned component one of its tensors."""
    kind = type(module)
    return lambda name, tensor: tensor if name in small.names else lazy_tensor(comm, stage, kind, name, tensor, cut)


def empty(module: nn.Module, replicated: Collection[str], shared: Collection[int] = ()) -> None:
    """Move the tensors of a module to meta, in place, except those that every rank has, by name or by id."""
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    kept = {id(tensor) for name, tensor in named if name in replicated} | set(shared)
    move_to_meta(module, named, kept)


def move_to_meta(module: nn.Module, named: Sequence[tuple[str, torch.Tensor]], kept: Collection[int]) -> None:
    """Move tensors of a module to meta, in place, given with all of their names; tied ones stay tied. kept: the ids of
    those that stay as they are."""
    moved: dict[int, torch.Tensor] = {}
    for name, tensor in named:
        if id(tensor) in kept or tensor.is_meta:
            continue
        if id(tensor) not in moved:
            meta = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
        set_tensor(module, name, moved[id(tensor)])


def run_on(
    comm: Comm,
    stage: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    small: ReplicatedTensors,
    attributes: Attributes,
) -> Any:
    """Run `function(*args, **kwargs)` on one stage; every stage gets the result, with pending tensors. Collective.

    Its writes to arguments, to tensors that every rank has and to attributes are repeated on every stage.
    """
    leaves = tree_leaves((args, kwargs))
    arguments = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    arrays = [leaf for leaf in leaves if isinstance(leaf, numpy.ndarray)]
    containers = Containers((args, kwargs))

    def run() -> tuple[Any, list[int], dict[int, numpy.ndarray], dict[str, torch.Tensor], Found, Changes]:
        before, tensors, values = [mark(t) for t in arguments], small.snapshot(), attributes.snapshot()
        copies, entries = [array.copy() for array in arrays], containers.snapshot()
        out = function(*args, **kwargs)
        written = [q for q, t in enumerate(arguments) if changed(t, before[q])]
        filled = {q: a for q, a in enumerate(arrays) if a.tobytes() != copies[q].tobytes()}
        put = containers.changes(entries)
        return out, written, filled, small.changes(tensors), attributes.changes(values), put

    generators = generators_in((args, kwargs))
    out, written, filled, new_tensors, new_values, put = call_on(comm, stage, run, arguments, generators)
    for q in written:
        LazyBroadcast.written(comm, stage, arguments[q])
    materialize((new_tensors, new_values))
    if comm.rank != stage:
        for q, array in filled.items():
            arrays[q][...] = array
        small.apply(new_tensors)
        attributes.apply(new_values)
    containers.apply(put)
    return out


def lazy_tensor(
    comm: Comm, owner: int, cls: type, name: str, tensor: torch.Tensor, cut: Collection[str] = ()
) -> torch.Tensor:
    """Return a pending tensor for a parameter or a buffer whose data one rank has.

    Raises UnsupportedError if the owner itself has only a slice of it.
    """
    if name in cut:
        raise UnsupportedError(
            f"code outside of {cls.__name__} reads {name}, which is cut over tensor ranks: use tensor_parallel_size=1"
        )
    if comm.rank == owner:
        out = LazyBroadcast(comm, owner, _memory_of(tensor)).wrap(tensor.detach())
    else:
        out = _empty_pending(comm, owner, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), 0)
    if isinstance(tensor, nn.Parameter):
        out._is_param = True  # pyright: ignore[reportAttributeAccessIssue]
    return out


class LazyBroadcast(PendingSource):
    """Data of one or more ranks, broadcast to all when the program first uses it.

    First use is at the same point on every rank, so the broadcast needs no agreement, and unused data is never sent.
    memory: the bytes on a rank that has them, a buffer of the same size on all others.
    """

    def __init__(self, comm: Comm, owner: int, memory: torch.Tensor):
        holders = [owner]  # not self.holders below: a reference cycle would keep unused data until garbage collection
        super().__init__(lambda: comm.broadcast(memory, holders[0]))
        self.comm, self.holders, self.memory = comm, holders, memory

    def provide(self, rank: int) -> None:
        """Send the data to one more rank. Every rank calls this, two take part."""
        if self.ready or rank in self.holders:
            return
        comm, source = self.comm, self.holders[0]
        if comm.rank == source and self.memory.numel():
            comm.wait(comm.send(self.memory, rank, result=True))
        elif comm.rank == rank and self.memory.numel():
            comm.wait(comm.receive(self.memory, source, result=True))
        self.holders.append(rank)

    @staticmethod
    def written(comm: Comm, owner: int, tensor: torch.Tensor) -> None:
        """Update all ranks after the owner has written to a tensor that others may have."""
        if isinstance(tensor, PendingTensor) and isinstance(tensor._source, LazyBroadcast):
            tensor._source.holders[:] = [owner]
        else:
            comm.broadcast(_memory_of(tensor), owner)


@contextmanager
def unwrapped(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Make pending tensors whose data this rank has plain tensors for a while, so that their use sends nothing."""
    pending = [(t, t._source) for t in tensors if isinstance(t, PendingTensor)]
    for tensor, _ in pending:
        tensor.__class__ = torch.Tensor  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for tensor, source in pending:
            if not source.ready:
                tensor.__class__ = PendingTensor


def call_on(
    comm: Comm,
    stage: int,
    function: Callable[[], Any],
    arguments: Sequence[torch.Tensor] = (),
    generators: Sequence[Generator] = (),
) -> Any:
    """Run a function on one stage; every stage gets its result, with pending tensors. Collective.

    `arguments`: tensors that every stage has, or has pending; parts of the result that are arguments are not sent.
    `generators`: random generators among the arguments. If the function advances one of them, or a global one, it
    advances on every stage. An exception of the function is raised on every stage.
    """
    given = list(generators)
    if comm.rank != stage:
        message, new_states = comm.group.broadcast_object(None, stage)
        set_states(new_states, comm.group.device, given)
        if isinstance(message, Exception):
            raise message
        blob, parts = message
        tensors = [arguments[p] if isinstance(p, int) else _empty_pending(comm, stage, *p) for p in parts]
        return load_with_tensors(blob, tensors)
    before = states(comm.group.device, given)
    try:
        blob, tensors = _dumped(function())
    except Exception as error:
        comm.group.broadcast_object((sendable(error), moved(before, states(comm.group.device, given))), stage)
        raise
    places = {id(t): number for number, t in enumerate(arguments)}
    parts, own = [], []
    for tensor in tensors:
        if id(tensor) in places:
            parts.append(places[id(tensor)])
            own.append(tensor)
            continue
        tensor = tensor.detach()
        parts.append((tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), _misalignment(tensor)))
        # The owner joins the broadcast when its own program first uses the tensor, so it is pending there, too.
        own.append(LazyBroadcast(comm, stage, _memory_of(tensor)).wrap(tensor))
    comm.group.broadcast_object(((blob, parts), moved(before, states(comm.group.device, given))), stage)
    return load_with_tensors(blob, own)


def _dumped(result: Any) -> tuple[bytes, list[torch.Tensor]]:
    try:
        return dump_with_tensors(result)
    except Exception as error:  # pickle raises several kinds
        raise UnsupportedError(
            f"a method of a component that one rank holds returns what cannot be sent to the others ({error}): return "
            "tensors and plain values"
        ) from error


def _memory_of(tensor: torch.Tensor) -> torch.Tensor:
    size = span(tuple(tensor.shape), tuple(tensor.stride())) * tensor.element_size()
    return storage_bytes(tensor, first_byte(tensor), size)


def _empty_pending(
    comm: Comm, stage: int, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], skew: int
) -> torch.Tensor:
    # NaN in every format until it is here, as in `core/stages/result.py`.
    length = skew + span(size, stride) * dtype.itemsize
    memory = torch.full((length,), 255, dtype=torch.uint8, device=comm.group.device)[skew:]
    return LazyBroadcast(comm, stage, memory).wrap(view_bytes(memory, 0, dtype, size, stride))


def _misalignment(tensor: torch.Tensor) -> int:
    """Return the bytes past the last aligned address: in some CPU kernels the last bits depend on alignment."""
    return first_byte(tensor) % ALIGN
