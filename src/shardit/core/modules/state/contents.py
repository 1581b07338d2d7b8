"""Contents of values that are modified in place: tensors, arrays, random generators, counters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from shardit.core.runtime.digests import checksum
from shardit.core.runtime.randomness import is_generator, set_state, state_in
from shardit.core.runtime.versions import value_bytes, version_of
from shardit.errors import UnsupportedError

MAX_COPIED, MAX_COPIED_PARAMETER = 2**22, 64
"""Elements of the largest tensors, and of the largest parameters, that are copied. For larger ones, torch's version
counter shows whether they were written to."""

TENSORS = (torch.Tensor, nn.Parameter)
"""Classes of tensors that are compared by content; others (pending, quantized) are compared by identity."""


@dataclass
class Content:
    """Content of a value at one time. version: torch's version counter of a tensor, None if there is none. held: a
    copy, or a checksum if the value is too large to be restored (None: only the version is known)."""

    path: str
    value: Any
    version: int | None
    held: Any
    outside: bool = False


def content_of(path: str, value: Any, copies: bool, outside: bool) -> Content | None:
    """Return the content of a value that can be modified in place; None for any other value. copies: whether to make it
    restorable."""
    if isinstance(value, torch.Tensor):
        if type(value) not in TENSORS or value.is_meta or value.layout is not torch.strided:
            return None
        parameter = isinstance(value, nn.Parameter)
        version, held = version_of(value), None
        if copies and value.numel() <= (MAX_COPIED_PARAMETER if parameter else MAX_COPIED):
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
    """Return whether a value was written to between two contents, as far as that can be detected. A tensor whose `data`
    were replaced in inference mode (by layerwise casting, say) has no version any more."""
    counted = before.version is not None and after.version is not None
    return (counted and before.version != after.version) or differs(before, after)


def differs(before: Content, after: Content) -> bool:
    """Return whether a value's content has changed."""
    one, other = before.held, after.held
    if one is None or other is None:
        return False
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (
            one.shape != other.shape
            or one.dtype != other.dtype
            or not torch.equal(value_bytes(one), value_bytes(other))
        )
    if isinstance(one, numpy.ndarray):
        return not numpy.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    return not _same_state(one, other)


def _same_state(one: Any, other: Any) -> bool:
    """Compare states of generators, and other values with `==`."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same_state, one, other))
    return numpy.array_equal(one, other) if isinstance(one, numpy.ndarray) else bool(one == other)


def restore_content(content: Content) -> None:
    """Restore the content of a value. Raises UnsupportedError if it has no copy."""
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
        content.version = None if content.version is None else version_of(value)
    elif isinstance(value, numpy.ndarray):
        value[...] = held
    elif is_generator(value):
        set_state(value, held)
    elif isinstance(value, bytearray):
        value[:] = held
    else:
        raise UnsupportedError(
            f"{content.path} is modified in place by a call, and cannot be restored after a trial call: keep such "
            "state in tensors of up to 4 million elements, numbers, or random generators"
        )


def nan_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of NaN like another; the other itself if its dtype has no NaN."""
    floats = tensor.is_floating_point() and tensor.itemsize > 1
    return torch.full_like(tensor, torch.nan) if floats else tensor


def fill_nan(content: Content) -> None:
    """Overwrite all numbers of a restorable tensor or array with NaN."""
    value = content.value
    if isinstance(value, torch.Tensor) and content.held is not None:
        with torch.no_grad():
            value.copy_(nan_like(value))
    elif isinstance(value, numpy.ndarray) and value.dtype.kind in "fc":
        value[...] = numpy.nan
