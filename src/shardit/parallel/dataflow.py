"""Tracks tensors derived from others while a block runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardit.core.runtime.storages import Storages, tensors_of, written


class Dataflow(TorchDispatchMode):
    """Marks the memory of some tensors, and of all results that operations compute from it."""

    def __init__(self, marked: Iterable[torch.Tensor]):
        super().__init__()
        self.supports_higher_order_operators = True
        self._marked = Storages()
        for tensor in marked:
            self.mark(tensor)

    def mark(self, tensor: torch.Tensor) -> None:
        """Mark the memory of a tensor."""
        self._marked.number(tensor)

    def marked(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor's memory is marked."""
        return tensor in self._marked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(self.marked(t) for t in tensors_of((args, kwargs))):
            for tensor in (*tensors_of(out), *written(func, args, kwargs)):
                self.mark(tensor)
        return out
