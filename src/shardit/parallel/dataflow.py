"""Tracks tensors derived from others while a block runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from shardit.core.plans.trace import HOST, deciding
from shardit.core.runtime.storages import Origins, tensors_of, written


class Dataflow(TorchDispatchMode):
    """Marks the memory of some tensors, and of all results that operations compute from it.

    by_values: whether values have been read that may decide about lengths.
    """

    def __init__(self, marked: Iterable[torch.Tensor]):
        super().__init__()
        self.supports_higher_order_operators = True
        self.by_values = False
        self._marks = Origins()
        for tensor in marked:
            self.mark(tensor)

    def mark(self, tensor: torch.Tensor) -> None:
        """Mark the memory of a tensor."""
        self._marks.add(tensor, (True,))

    def marked(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor's memory is marked."""
        return bool(self._marks.of([tensor]))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing: some attention functions cannot be traced inside, and need not be."""
        before = self.by_values
        with without_modes():
            yield
        self.by_values = before

    def decides(self, _: torch.Tensor) -> None:
        """Note that values of a tensor have been read."""
        self.by_values = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        reads = tensors_of((args, kwargs))
        if HOST.keys() & getattr(func, "tags", ()):
            self.by_values |= bool(deciding(func, reads, args))
        self._marks.derive((*tensors_of(out), *written(func, args, kwargs)), reads)
        return out
