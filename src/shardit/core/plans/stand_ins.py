"""Stand-ins for outputs of blocks that do not run here: tensors of the right shape over memory without the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardit.core.comm.wire import first_byte, view_bytes, view_near
from shardit.core.plans.call_plan import Leaf, Site
from shardit.core.runtime.storages import storage_key

Memory = Callable[[Leaf], tuple[torch.Tensor, int]]
"""Memory for the new storage of a leaf, and the byte of the storage at which that begins."""


def stand_ins(site: Site, arguments: list[Any], memory: Memory) -> list[Any]:
    """The leaves of a block call's output. arguments: the leaves of what the block was called with."""
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
    """Whether the outputs of a block lie in the memory that the site tells of: several in one storage, or in that of an
    argument. Others would not be carried."""
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


def blank(leaf: Leaf, device: torch.device) -> torch.Tensor:
    """Memory for a new storage. Arithmetic on what was never written is harmless; indexing with it is not."""
    make = torch.empty if is_float(leaf) else torch.zeros
    return make(leaf.nbytes, dtype=torch.uint8, device=device)


def is_float(leaf: Leaf) -> bool:
    """Whether a tensor leaf can hold NaN."""
    assert leaf.dtype is not None
    return leaf.dtype.is_floating_point or leaf.dtype.is_complex
