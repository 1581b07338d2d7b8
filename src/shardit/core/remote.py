"""Components that one rank owns whole (text encoders, VAE): their outputs travel, not their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from .comm import ALIGN, Comm, dump_with_tensors, first_byte, load_with_tensors, storage_bytes, view_bytes
from .pending import Source, settle
from .plan import span
from .sites import fixed_place, swap_class
from .traced_call import sendable

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


def call_on(comm: Comm, stage: int, function: Callable[[], Any]) -> Any:
    """Run a function on one stage; every stage gets its result, with pending tensors. Collective.

    Raises what the function raises, on every stage.
    """
    if comm.rank != stage:
        message = comm.broadcast_object(None, stage)
        if isinstance(message, Exception):
            raise message
        blob, descriptions = message
        return load_with_tensors(blob, [_receiver(comm, stage, *d) for d in descriptions])
    try:
        blob, tensors = dump_with_tensors(function())
    except Exception as error:
        comm.broadcast_object(sendable(error), stage)
        raise
    tensors = [t.detach() for t in tensors]
    descriptions = [(t.dtype, tuple(t.shape), tuple(t.stride()), _misalignment(t)) for t in tensors]
    comm.broadcast_object((blob, descriptions), stage)
    # The owner takes part in the broadcast when its own program first uses the tensor: there it is pending, too.
    return load_with_tensors(blob, [Source(_sender(comm, stage, t)).wrap(t) for t in tensors])


def _sender(comm: Comm, stage: int, tensor: torch.Tensor) -> Callable[[], None]:
    start = first_byte(tensor)
    size = span(tuple(tensor.shape), tuple(tensor.stride())) * tensor.element_size()
    return lambda: comm.broadcast(storage_bytes(tensor, start, size), stage)


def _receiver(
    comm: Comm, stage: int, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], skew: int
) -> torch.Tensor:
    memory = torch.empty(skew + span(size, stride) * dtype.itemsize, dtype=torch.uint8, device=comm.mesh.device)[skew:]
    return Source(lambda: comm.broadcast(memory, stage)).wrap(view_bytes(memory, 0, dtype, size, stride))


def _misalignment(tensor: torch.Tensor) -> int:
    """Bytes past the last aligned address: some CPU kernels give other last bits for memory aligned in another way."""
    return first_byte(tensor) % ALIGN
