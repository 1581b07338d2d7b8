"""Tracks the memory of tensors, and the reads and writes of operations, for dispatch modes that follow dataflow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves


class Storages:
    """Numbers the storages under tensors in order of appearance."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        # A weak reference prevents reuse of the address of a dead storage, and keeps none of its data alive.
        self._refs: list[StorageWeakRef] = []

    def number(self, tensor: torch.Tensor) -> int:
        """Return the number of the storage under a tensor; a new one gets the next."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = len(self._refs)
            self._refs.append(StorageWeakRef(storage))
        return self._numbers[storage._cdata]

    def __contains__(self, tensor: torch.Tensor) -> bool:
        """Return whether the storage under a tensor has a number."""
        return storage_key(tensor) in self._numbers


class Origins(Storages):
    """Tracks which tensors derive from which. sources: of the content of each storage, by its number; they are whatever
    the caller names so."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, frozenset[Any]] = {}

    def add(self, tensor: torch.Tensor, sources: Iterable[Any]) -> None:
        """Add sources to those of a tensor."""
        number = self.number(tensor)
        self.sources[number] = self.of([tensor]).union(sources)

    def of(self, tensors: Iterable[torch.Tensor]) -> frozenset[Any]:
        """Return the sources of some tensors."""
        return frozenset().union(*(self.sources.get(self.number(t), ()) for t in tensors if t in self))

    def derive(self, made: Iterable[torch.Tensor], reads: Iterable[torch.Tensor]) -> None:
        """Record that an operation has made tensors, or written to them, from those that it reads."""
        sources = self.of(reads)
        for tensor in made if sources else ():
            self.add(tensor, sources)


def storage_key(tensor: torch.Tensor) -> int:
    """Return a key that identifies the storage under a tensor as long as it lives."""
    return tensor.untyped_storage()._cdata


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the arguments that an operation writes to."""
    if not isinstance(func, torch._ops.OpOverload) or not func._schema.is_mutable:
        return []
    specs = func._schema.arguments
    values = [a for a, spec in zip(args, specs, strict=False) if _writes(spec)]
    return tensors_of(values + [kwargs[spec.name] for spec in specs if _writes(spec) and spec.name in kwargs])


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
