"""Components that one rank owns whole (text encoders, VAE): their outputs travel, not their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
from shardit.core.components.boundary import Boundary, Read
from shardit.core.modules.attributes import Attributes, Found
from shardit.core.modules.patching import put
from shardit.core.modules.small_tensors import Everywhere
from shardit.core.runtime.pending import PendingTensor, Source, materialize
from shardit.core.runtime.randomness import Generator, generators_in, moved, set_states, states
from shardit.core.runtime.versions import changed, mark
from shardit.errors import UnsupportedError


def own(
    module: nn.Module,
    comm: Comm,
    stage: int,
    everywhere: Collection[str] = (),
    cut: Collection[str] = (),
    shared: Collection[int] = (),
    alone: Callable[[], bool] = lambda: False,
) -> None:
    """Let `stage` alone hold a component, in place: the others keep its shape on meta and get its outputs.

    An output is broadcast tensor by tensor when the program first uses it, which is at the same point on every rank;
    what nobody uses (hidden states of all layers, say) never travels. So is a parameter or a buffer that code outside
    the component reads, unless it is one of those that every rank has (`everywhere`). `cut`: parameters of which the
    stage holds a slice; reading one from outside raises UnsupportedError. `shared`: ids of the tensors that another
    component has, too; every rank keeps them. `alone`: see Boundary.
    """
    if comm.rank != stage:
        empty(module, everywhere, shared)
    small = Everywhere(module, everywhere)
    attributes = Attributes(lambda: boundary.reached)
    boundary = Boundary(
        comm.group.device,
        lambda path, name, function, args, kwargs: run_on(comm, stage, function, args, kwargs, small, attributes),
        reader(module, comm, stage, small, cut),
        alone=alone,
    )
    boundary.put(module, "")


def reader(module: nn.Module, comm: Comm, stage: int, small: Everywhere, cut: Collection[str] = ()) -> Read:
    """What code outside of an owned component gets for one of its tensors."""
    kind = type(module)
    return lambda name, tensor: tensor if name in small.names else fetched(comm, stage, kind, name, tensor, cut)


def empty(module: nn.Module, everywhere: Collection[str], shared: Collection[int] = ()) -> None:
    """Move the tensors of a module to meta, in place, but for those that every rank has, by name or by id."""
    moved: dict[int, torch.Tensor] = {}  # tied ones stay tied
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    kept = {id(tensor) for name, tensor in named if name in everywhere} | set(shared)
    for name, tensor in named:
        if id(tensor) in kept or tensor.is_meta:
            continue
        if id(tensor) not in moved:
            meta = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
        put(module, name, moved[id(tensor)])


def run_on(
    comm: Comm,
    stage: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    small: Everywhere,
    attributes: Attributes,
) -> Any:
    """`function(*args, **kwargs)` on one stage; every stage gets its result, with pending tensors. Collective.

    What it writes into its arguments, into the tensors that every rank has and into attributes is then the same on
    every stage.
    """
    arguments = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]

    def run() -> tuple[Any, list[int], dict[str, torch.Tensor], Found]:
        before, looked, seen = [mark(t) for t in arguments], small.look(), attributes.look()
        out = function(*args, **kwargs)
        written = [q for q, t in enumerate(arguments) if changed(t, before[q])]
        return out, written, small.written(looked), attributes.written(seen)

    out, written, news, left = call_on(comm, stage, run, arguments, generators_in((args, kwargs)))
    for q in written:
        Held.written(comm, stage, arguments[q])
    materialize((news, left))
    if comm.rank != stage:
        small.take(news)
        attributes.take(left)
    return out


def fetched(
    comm: Comm, owner: int, cls: type, name: str, tensor: torch.Tensor, cut: Collection[str] = ()
) -> torch.Tensor:
    """A parameter or a buffer of which one rank has the data, as every rank gets it: pending.

    Raises UnsupportedError where the owner itself has only a slice of it.
    """
    if name in cut:
        raise UnsupportedError(
            f"code outside of {cls.__name__} reads {name}, which is cut over tensor ranks: use tensor_parallel_size=1"
        )
    if comm.rank == owner:
        out = Held(comm, owner, _memory_of(tensor)).wrap(tensor.detach())
    else:
        out = _room(comm, owner, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), 0)
    if isinstance(tensor, nn.Parameter):
        out._is_param = True  # pyright: ignore[reportAttributeAccessIssue]
    return out


class Held(Source):
    """Data that one rank has, or some, and that all get when the program first uses it.

    That is at the same point on every rank, so the broadcast needs no agreement, and what nobody uses never travels.
    memory: on a rank that has it the bytes themselves, on others room for them.
    """

    def __init__(self, comm: Comm, owner: int, memory: torch.Tensor):
        holders = [owner]  # not self.holders below: what nobody uses is to go at once, not with the next collection
        super().__init__(lambda: comm.broadcast(memory, holders[0]))
        self.comm, self.holders, self.memory = comm, holders, memory

    def bring(self, rank: int) -> None:
        """Let one more rank have the data. Every rank calls this, two take part."""
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
        """The owner has written to a tensor that others may have."""
        if isinstance(tensor, PendingTensor) and isinstance(tensor._source, Held):
            tensor._source.holders[:] = [owner]
        else:
            comm.broadcast(_memory_of(tensor), owner)


@contextmanager
def held_here(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Meanwhile pending tensors whose data this rank has are plain ones, and using them moves nothing."""
    lent = [(t, t._source) for t in tensors if isinstance(t, PendingTensor)]
    for tensor, _ in lent:
        tensor.__class__ = torch.Tensor  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for tensor, source in lent:
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

    `arguments`: tensors that every stage has, or has pending; where the result is one of them, nothing is sent.
    `generators`: those that the function is given. Where it moves one of them, or a global one, every stage's moves.
    Raises what the function raises, on every stage.
    """
    given = list(generators)
    if comm.rank != stage:
        message, news = comm.group.broadcast_object(None, stage)
        set_states(news, comm.group.device, given)
        if isinstance(message, Exception):
            raise message
        blob, parts = message
        return load_with_tensors(blob, [arguments[p] if isinstance(p, int) else _room(comm, stage, *p) for p in parts])
    before = states(comm.group.device, given)
    try:
        blob, tensors = dump_with_tensors(function())
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
        # The owner takes part in the broadcast when its own program first uses the tensor: there it is pending, too.
        own.append(Held(comm, stage, _memory_of(tensor)).wrap(tensor))
    comm.group.broadcast_object(((blob, parts), moved(before, states(comm.group.device, given))), stage)
    return load_with_tensors(blob, own)


def _memory_of(tensor: torch.Tensor) -> torch.Tensor:
    size = span(tuple(tensor.shape), tuple(tensor.stride())) * tensor.element_size()
    return storage_bytes(tensor, first_byte(tensor), size)


def _room(
    comm: Comm, stage: int, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], skew: int
) -> torch.Tensor:
    memory = torch.empty(skew + span(size, stride) * dtype.itemsize, dtype=torch.uint8, device=comm.group.device)[skew:]
    return Held(comm, stage, memory).wrap(view_bytes(memory, 0, dtype, size, stride))


def _misalignment(tensor: torch.Tensor) -> int:
    """Bytes past the last aligned address: some CPU kernels give other last bits for memory aligned in another way."""
    return first_byte(tensor) % ALIGN
