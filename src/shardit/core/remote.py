"""Components that one rank owns whole (text encoders, VAE): their outputs travel, not their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from .comm import ALIGN, Comm, dump_with_tensors, first_byte, load_with_tensors, storage_bytes, view_bytes
from .meeting import sendable
from .pending import PendingTensor, Source, settle
from .plan import span
from .sites import fixed_place, swap_class

METHODS = (
    "__call__",
    "encode",
    "decode",
    "generate",
    "encode_image",
    "encode_text",
    "get_image_features",
    "get_text_features",
)
"""What pipelines call of a component. Everything else (config, dtype, tiling switches) needs no weights."""


def own(module: nn.Module, comm: Comm, stage: int) -> None:
    """Let `stage` alone hold a component, in place: the others keep its shape on meta and get its outputs.

    An output is broadcast tensor by tensor when the program first uses it, which is at the same point on every rank;
    what nobody uses (hidden states of all layers, say) never travels.
    """
    if comm.rank != stage:
        module.to("meta")
    at_calls(
        module,
        comm.mesh.device,
        lambda name, plain, args, kwargs: call_on(comm, stage, lambda: plain(*args, **kwargs)),
    )


Run = Callable[[str, MethodType, tuple[Any, ...], dict[str, Any]], Any]
"""What to do at a call of a component: the method's name, the method itself, arguments without pending tensors."""


def at_calls(module: nn.Module, device: torch.device, run: Run) -> None:
    """Have `run` decide, in place, what a component does where a pipeline calls it."""
    running = {"inside": False}  # a component's methods call each other

    def seam(name: str) -> Callable[..., Any]:
        plain = getattr(type(module), name)

        @functools.wraps(plain)
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if running["inside"]:
                return plain(self, *args, **kwargs)
            settle((args, kwargs))
            running["inside"] = True
            try:
                return run(name, MethodType(plain, self), args, kwargs)
            finally:
                running["inside"] = False

        return method

    members: dict[str, Any] = {name: seam(name) for name in METHODS if callable(getattr(type(module), name, None))}
    members["device"] = property(lambda self: device)
    members["to"] = fixed_place(type(module).to, device)
    swap_class(module, members)


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
        if self.settled or rank in self.holders:
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
            if not source.settled:
                tensor.__class__ = PendingTensor


def call_on(comm: Comm, stage: int, function: Callable[[], Any], arguments: Sequence[torch.Tensor] = ()) -> Any:
    """Run a function on one stage; every stage gets its result, with pending tensors. Collective.

    `arguments`: tensors that every stage has, or has pending; where the result is one of them, nothing is sent.
    Raises what the function raises, on every stage.
    """
    if comm.rank != stage:
        message = comm.broadcast_object(None, stage)
        if isinstance(message, Exception):
            raise message
        blob, parts = message
        return load_with_tensors(blob, [arguments[p] if isinstance(p, int) else _room(comm, stage, *p) for p in parts])
    try:
        blob, tensors = dump_with_tensors(function())
    except Exception as error:
        comm.broadcast_object(sendable(error), stage)
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
    comm.broadcast_object((blob, parts), stage)
    return load_with_tensors(blob, own)


def _memory_of(tensor: torch.Tensor) -> torch.Tensor:
    size = span(tuple(tensor.shape), tuple(tensor.stride())) * tensor.element_size()
    return storage_bytes(tensor, first_byte(tensor), size)


def _room(
    comm: Comm, stage: int, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], skew: int
) -> torch.Tensor:
    memory = torch.empty(skew + span(size, stride) * dtype.itemsize, dtype=torch.uint8, device=comm.mesh.device)[skew:]
    return Held(comm, stage, memory).wrap(view_bytes(memory, 0, dtype, size, stride))


def _misalignment(tensor: torch.Tensor) -> int:
    """Bytes past the last aligned address: some CPU kernels give other last bits for memory aligned in another way."""
    return first_byte(tensor) % ALIGN
