"""Which tensors derive from others, seen while a block runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Dataflow(TorchDispatchMode):
    """Marks the memory of some tensors, and of all that operations compute from it."""

    def __init__(self, marked: Iterable[torch.Tensor]):
        super().__init__()
        self.supports_higher_order_operators = True
        self._marks: set[int] = set()
        # A weak reference keeps the address of a dead storage from being used again, and holds none of its data.
        self._refs: list[StorageWeakRef] = []
        for tensor in marked:
            self.mark(tensor)

    def mark(self, tensor: torch.Tensor) -> None:
        """Mark the memory of a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._marks:
            self._marks.add(storage._cdata)
            self._refs.append(StorageWeakRef(storage))

    def marked(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is marked."""
        return tensor.untyped_storage()._cdata in self._marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(self.marked(t) for t in tensors_of((args, kwargs))):
            for tensor in (*tensors_of(out), *written(func, args)):
                self.mark(tensor)
        return out


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def written(func: Any, args: Any) -> list[torch.Tensor]:
    """The arguments that an operation writes to."""
    if not isinstance(func, torch._ops.OpOverload) or not func._schema.is_mutable:
        return []
    pairs = zip(args, func._schema.arguments, strict=False)
    return tensors_of([a for a, spec in pairs if spec.alias_info is not None and spec.alias_info.is_write])
