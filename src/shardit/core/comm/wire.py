"""Bytes on the wire: layouts of messages, byte views of tensors, pickling with tensors."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch


def span(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the number of elements from the first to the last one of a strided tensor."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


@dataclass(frozen=True)
class MessageLayout:
    """The layout of one message: (offset, size) in bytes for each part, and the total size."""

    parts: tuple[tuple[int, int], ...]
    total: int


def pack_layout(sizes: tuple[int, ...]) -> MessageLayout:
    """Lay out parts of the given sizes (bytes) one after the other, aligned; one part alone needs no padding."""
    parts, offset = [], 0
    for size in sizes:
        parts.append((offset, size))
        offset += -(-size // ALIGN) * ALIGN if len(sizes) > 1 else size
    return MessageLayout(tuple(parts), offset)


def message_memory(size: int, device: torch.device) -> torch.Tensor:
    """Return memory for a message of `size` bytes, which is received in any mode: a tensor made in inference mode could
    only be written to in that mode."""
    if not torch.is_inference_mode_enabled():
        return torch.empty(size, dtype=torch.uint8, device=device)
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device=device)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a dense tensor as a flat byte tensor that shares it."""
    return storage_bytes(tensor, first_byte(tensor), tensor.numel() * tensor.element_size())


def storage_bytes(tensor: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """Return bytes [start, start + size) of the storage under `tensor`, as a flat byte tensor that shares it."""
    out = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return out.set_(tensor.untyped_storage(), start, (size,), (1,))


def view_bytes(
    buffer: torch.Tensor, start: int, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """Return a tensor of the given dtype, size and stride over the memory of a flat byte buffer, from byte `start`
    on."""
    out = torch.empty(0, dtype=dtype, device=buffer.device)
    offset = buffer.storage_offset() + start
    return out.set_(buffer.untyped_storage(), offset // out.element_size(), size, stride)


def first_byte(tensor: torch.Tensor) -> int:
    """Return the byte of its storage at which a tensor begins."""
    return int(tensor.storage_offset()) * tensor.element_size()


def view_near(
    tensor: torch.Tensor, start: int, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """Return a tensor over the memory of another, from `start` bytes behind (or before) the first element of that
    one."""
    out = torch.empty(0, dtype=dtype, device=tensor.device)
    return out.set_(tensor.untyped_storage(), (first_byte(tensor) + start) // out.element_size(), size, stride)


def dump_with_tensors(value: Any) -> tuple[bytes, list[torch.Tensor]]:
    """Pickle any object with its tensors taken out; return the tensors in the order of their numbers."""
    out = io.BytesIO()
    pickler = _TensorPickler(out)
    pickler.dump(value)
    return out.getvalue(), pickler.tensors


def load_with_tensors(data: bytes, tensors: list[torch.Tensor]) -> Any:
    """Invert `dump_with_tensors`."""
    return _Unpickler(io.BytesIO(data), tensors).load()


# Not local classes: a class is part of a reference cycle, which would keep the tensors until it is collected.
class _TensorPickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO):
        super().__init__(out, protocol=5)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: io.BytesIO, tensors: list[torch.Tensor]):
        super().__init__(data)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self._tensors[pid]


ALIGN = 64
"""Alignment in bytes of every tensor of a packed message, so that any dtype can be viewed in place."""
