"""Attributes that a call of an owned component sets on its modules, copied to every rank for code outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.device)

Parts = Callable[[], Iterable[tuple[str, nn.Module]]]
"""The parts of a component that code outside has reached, by name."""

_MUTABLE = (list, dict, set)
"""Containers that a call may change in place."""

_MOST = 4096
"""Items of those up to which changes are looked for: a vocabulary is not copied at each call."""

Found = dict[tuple[str, str], Any]
"""Values of attributes, by the name of the part and that of the attribute."""


class Attributes:
    """Public attributes of parts: numbers, strings and tensors, also in containers. All others, and private ones
    (`_name`), stay on the rank that runs the part."""

    def __init__(self, parts: Parts):
        self._parts = parts

    def snapshot(self) -> Found:
        """Return the present values, for `changes`."""
        return {
            (path, name): value.copy() if type(value) in _MUTABLE and len(value) <= _MOST else value
            for path, module in self._parts()
            for name, value in vars(module).items()
            if not name.startswith("_") and not isinstance(value, nn.Module)
        }

    def changes(self, before: Found) -> Found:
        """Return the attributes that a call has set since the snapshot `before`."""
        now = self.snapshot()
        return {key: value for key, value in now.items() if not _same(before.get(key, now), value) and _sendable(value)}

    def apply(self, changes: Found) -> None:
        """Set the attributes that the call has set on the rank that ran it."""
        modules = dict(self._parts())
        for (path, name), value in changes.items():
            vars(modules[path])[name] = value


def _same(before: Any, now: Any) -> bool:
    if before is now or type(before) is not type(now):
        return before is now
    if isinstance(now, (list, tuple)):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(now, dict):
        return before.keys() == now.keys() and all(_same(value, now[key]) for key, value in before.items())
    return isinstance(now, (*PLAIN, set)) and before == now


def _sendable(value: Any) -> bool:
    leaves = tree_leaves(list(value) if isinstance(value, set) else value)
    return all(isinstance(leaf, (*PLAIN, torch.Tensor)) for leaf in leaves)
