"""Attributes that a call of an owned component leaves on its modules: code outside finds them on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.device)

Parts = Callable[[], Iterable[tuple[str, nn.Module]]]
"""The parts of a component that code outside has reached, by name."""

Found = dict[tuple[str, str], Any]
"""Values of attributes, by the name of the part and that of the attribute."""


class Attributes:
    """Public attributes of parts: numbers, texts and tensors, in containers, too. Others, and what is private to the
    code of a part (`_name`), stay on the rank that runs it."""

    def __init__(self, parts: Parts):
        self._parts = parts

    def look(self) -> Found:
        """What tells `written` later which of them are others."""
        return {
            (path, name): value
            for path, module in self._parts()
            for name, value in vars(module).items()
            if not name.startswith("_") and not isinstance(value, nn.Module)
        }

    def written(self, before: Found) -> Found:
        """Those that a call has set since `look`."""
        now = self.look()
        return {key: value for key, value in now.items() if not _same(before.get(key, now), value) and _travels(value)}

    def take(self, news: Found) -> None:
        """Set what the rank that ran the call has set."""
        modules = dict(self._parts())
        for (path, name), value in news.items():
            vars(modules[path])[name] = value


def _same(before: Any, now: Any) -> bool:
    return before is now or (type(before) is type(now) and isinstance(now, PLAIN) and before == now)


def _travels(value: Any) -> bool:
    return all(isinstance(leaf, (*PLAIN, torch.Tensor)) for leaf in tree_leaves(value))
