"""Stand-ins for outputs of blocks that do not run here: tensors of the right shape over memory without the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardit.core.comm.wire import first_byte, view_bytes, view_near
from shardit.core.plans.call_plan import Leaf, Site
from shardit.core.runtime.storages import storage_key

Memory = Callable[[Leaf], tuple[torch.Tensor, int]]
"""Returns memory for the new storage of a leaf, and the first byte of the storage in that memory."""


def stand_ins(site: Site, arguments: list[Any], memory: Memory) -> list[Any]:
    """Return stand-ins for the output leaves of a block call. arguments: its argument leaves."""
    storages: dict[int, tuple[torch.Tensor, int]] = {}
    leaves: list[Any] = []
    for leaf in site.leaves:
        if leaf.kind == "value":
            leaves.append(leaf.value)
            continue
        assert leaf.dtype is not None
        if leaf.kind == "arg":
            base = arguments[leaf.arg]
            leaves.append(base if leaf.same else view_near(base, leaf.offset, leaf.dtype, leaf.size, leaf.stride))
            continue
        if leaf.storage not in storages:
            storages[leaf.storage] = memory(leaf)
        held, start = storages[leaf.storage]
        leaves.append(view_bytes(held, leaf.offset * leaf.dtype.itemsize - start, leaf.dtype, leaf.size, leaf.stride))
    return leaves


def same_memory(site: Site, leaves: Sequence[Any], arguments: Sequence[Any]) -> bool:
    """Return whether the outputs of a block share memory as described in the site: with each other or with an argument.
    Other sharing would not be carried."""
    storages: dict[int, int] = {}
    for leaf, got in zip(site.leaves, leaves, strict=True):
        if leaf.kind == "value":
            continue
        storage = storage_key(got)
        if leaf.kind == "tensor" and storages.setdefault(leaf.storage, storage) != storage:
            return False
        if leaf.kind == "arg":
            base = arguments[leaf.arg]
            if storage != storage_key(base) or first_byte(got) - first_byte(base) != leaf.offset:
                return False
    return True


def check_kind(expected: Leaf, got: Any, what: str) -> None:
    """Raise RuntimeError if a value is not of the kind that the plan expects."""
    if isinstance(got, torch.Tensor):
        same = expected.kind != "value" and (got.dtype, tuple(got.shape)) == (expected.dtype, expected.size)
        if not same or (expected.kind == "tensor" and what != "the result" and tuple(got.stride()) != expected.stride):
            found, known = (got.dtype, tuple(got.shape), got.stride()), (expected.dtype, expected.size, expected.stride)
            raise RuntimeError(
                f"{what} gives {found}, not {known} (dtype, shape, strides) as before: it follows values, which other "
                "ranks do not have: use pipeline_parallel_size=1 and cfg_parallel_size=1"
            )
    elif expected.kind != "value" or got != expected.value:
        raise RuntimeError(f"{what} gives {got!r}, which was {expected.value!r} in the first call of this signature")


def blank(leaf: Leaf, device: torch.device) -> torch.Tensor:
    """Allocate memory for a new storage. Arithmetic on uninitialized floats is harmless; indexing with uninitialized
    integers is not, so these are zero."""
    make = torch.empty if is_float(leaf) else torch.zeros
    return make(leaf.nbytes, dtype=torch.uint8, device=device)


def is_float(leaf: Leaf) -> bool:
    """Return whether a tensor leaf can contain NaN."""
    assert leaf.dtype is not None
    return leaf.dtype.is_floating_point or leaf.dtype.is_complex
