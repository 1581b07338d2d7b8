"""Values that are changed in place: tensors, arrays, random generators, counters; what they hold at one time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from shardit.core.runtime.digests import checksum
from shardit.core.runtime.randomness import is_generator, set_state, state_in
from shardit.errors import UnsupportedError

COPIED, PARAMETER = 2**22, 64
"""Elements of the largest tensors, and of the largest parameters, of which a copy is kept. Of larger ones torch's count
of writes tells whether they were written to."""

TENSORS = (torch.Tensor, nn.Parameter)
"""Classes of tensors that are looked at; others (pending, quantized) count by identity."""


@dataclass
class Content:
    """What a value holds. version: torch's count of the writes to a tensor, None where nobody counts. held: a copy, or
    a checksum where the value is too large to be put back (None: the version alone tells)."""

    path: str
    value: Any
    version: int | None
    held: Any
    outside: bool = False


def content_of(path: str, value: Any, copies: bool, outside: bool) -> Content | None:
    """The content of a value that can be changed in place; None of any other. copies: so that it can be put back."""
    if isinstance(value, torch.Tensor):
        if type(value) not in TENSORS or value.is_meta or value.layout is not torch.strided:
            return None
        parameter = isinstance(value, nn.Parameter)
        version, held = None if value.is_inference() else value._version, None
        if copies and value.numel() <= (PARAMETER if parameter else COPIED):
            held = value.detach().clone()
        elif version is None and not parameter:
            held = checksum(value.detach())
        return Content(path, value, version, held, outside)
    if isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        held = value.copy()
    elif is_generator(value):
        held = state_in(value)
    elif isinstance(value, bytearray):
        held = bytes(value)
    elif isinstance(value, itertools.count):
        held = repr(value)
    else:
        return None
    return Content(path, value, None, held, outside)


def written(before: Content, after: Content) -> bool:
    """Whether a value was written to in between, as far as can be seen."""
    return before.version != after.version or differs(before, after)


def differs(before: Content, after: Content) -> bool:
    """Whether a value holds something else than before."""
    one, other = before.held, after.held
    if one is None or other is None:
        return False
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape != other.shape or one.dtype != other.dtype or not torch.equal(_bits(one), _bits(other))
    if isinstance(one, numpy.ndarray):
        return not numpy.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    return not _same_state(one, other)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _same_state(one: Any, other: Any) -> bool:
    """Of generators and of all that compares by itself."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same_state, one, other))
    return numpy.array_equal(one, other) if isinstance(one, numpy.ndarray) else bool(one == other)


def put_back(content: Content) -> None:
    """Let a value hold again what it held. Raises UnsupportedError where that is not known."""
    now = content_of(content.path, content.value, content.version is None or content.held is not None, False)
    if now is None or not written(content, now):
        return
    value = content.value
    held: Any = content.held
    if isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor):
        if value.shape != held.shape:
            value.data = held.clone()
        elif differs(content, now):
            with torch.no_grad():
                value.copy_(held)
        content.version = None if content.version is None else value._version
    elif isinstance(value, numpy.ndarray):
        value[...] = held
    elif is_generator(value):
        set_state(value, held)
    elif isinstance(value, bytearray):
        value[:] = held
    else:
        raise UnsupportedError(
            f"{content.path} is changed in place by a call, and cannot be put back after the call was tried: keep such "
            "state in tensors of up to 4 million elements, numbers, or random generators"
        )


def spoilt(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of NaN in place of another; the other itself where its numbers have none."""
    floats = tensor.is_floating_point() and tensor.itemsize > 1
    return torch.full_like(tensor, torch.nan) if floats else tensor


def spoil(content: Content) -> None:
    """Put NaN in place of all numbers of a tensor or an array that can be put back."""
    value = content.value
    if isinstance(value, torch.Tensor) and content.held is not None:
        with torch.no_grad():
            value.copy_(spoilt(value))
    elif isinstance(value, numpy.ndarray) and value.dtype.kind in "fc":
        value[...] = numpy.nan
