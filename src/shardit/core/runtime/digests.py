"""Checksums of the arguments of calls, for the comparison between ranks."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import inspect
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from shardit.core.runtime.pending import materialize
from shardit.core.runtime.randomness import is_generator, state_in
from shardit.core.runtime.versions import value_bytes

SAMPLES = 4096
"""Number of words of a larger tensor that enter the checksum by position; all others only by their sum."""


SUMMED = 2**20
"""Bytes above which only samples of a tensor count if a pipeline has computed it itself: such a tensor, as the
embeddings of a prompt, differs nearly everywhere if at all, and reading it all takes longer than the messages."""


PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.Size, range, slice, enum.Enum, Path)


def named(function: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a method call by name (without `self`); by number if the method does not take them, or
    is not known."""
    if function is not None:
        with contextlib.suppress(TypeError, ValueError):
            return _by_name(_signature(function), args, kwargs)
    return {**{str(number): value for number, value in enumerate(args)}, **kwargs}


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    found = dict(signature.bind_partial(None, *args, **kwargs).arguments)
    found.pop(next(iter(signature.parameters)), None)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
    return found


@functools.lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def digests(arguments: Mapping[str, Any], summed: int | None = None) -> dict[str, bytes]:
    """Return a checksum of each argument, in order of names. Waits for pending tensors.

    Strings, numbers, tensors, arrays, images and generators count by value, in containers, too; other objects (and
    functions, which may be different objects on each rank) by their kind alone. Of tensors with more than `summed`
    bytes (None: no limit) only samples count.
    """
    materialize(list(arguments.values()))
    return {name: short_hash(*_described(arguments[name], summed)) for name in sorted(arguments)}


def _described(value: Any, summed: int | None) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield repr((tuple(value.shape), value.dtype)).encode()
        yield checksum(value, summed)
    elif isinstance(value, numpy.ndarray):
        yield repr((value.shape, value.dtype.str)).encode()
        yield repr(value.tolist()).encode() if value.dtype.hasobject else checksum(_of_array(value))
    elif isinstance(value, torch.Generator):
        yield value.device.type.encode()
        yield state_bytes(value.get_state())
    elif is_generator(value):
        yield state_bytes(state_in(value))
    elif isinstance(value, (*PLAIN, numpy.generic)):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _described(item, summed)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)}".encode()
        for item in value:
            yield from _described(item, summed)
    elif isinstance(value, (set, frozenset)):
        yield repr(sorted(map(repr, value))).encode()
    elif hasattr(value, "__array_interface__"):  # an image
        yield from _described(numpy.asarray(value), summed)
    elif callable(value):
        yield b"function"
    else:
        yield type(value).__qualname__.encode()


def _of_array(array: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8).copy())


def checksum(tensor: torch.Tensor, summed: int | None = None) -> bytes:
    """Return a checksum of the values of a tensor, on any device. It costs about one read of them, or, with more than
    `summed` bytes, a read of SAMPLES words."""
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return b""
    with torch.no_grad():
        raw = value_bytes(tensor)
        tail = raw.numel() % 8
        words = raw[: raw.numel() - tail]
        if words.data_ptr() % 8 or words.storage_offset() % 8:
            words = words.clone()
        words = words.view(torch.int64)
        sampled = words[:: max(1, -(-words.numel() // SAMPLES))]
        whole = summed is None or words.nbytes <= summed
        total = (words if whole else sampled).sum().reshape(1)  # wraps around
        known = torch.cat([total.view(torch.uint8), sampled.contiguous().view(torch.uint8), raw[raw.numel() - tail :]])
    return zlib.crc32(known.cpu().numpy().tobytes()).to_bytes(4, "little") + bytes(known[:8].tolist())


def state_bytes(state: Any) -> bytes:
    """Return the state of a generator as bytes."""
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else pickle.dumps(state)


def short_hash(*parts: bytes) -> bytes:
    """Return a hash of eight bytes over parts; no other division into parts has the same hash."""
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        made.update(len(part).to_bytes(8, "little"))
        made.update(part)
    return made.digest()
