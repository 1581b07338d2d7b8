"""Snapshots of class members and module settings, compared to detect later changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Values of attributes that can be settings of a module."""

COLLECTIONS = (list, tuple, set, frozenset, dict)
MAX_ITEMS = 256
"""Collections of those, and their maximum length."""

OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of every module that are not settings."""

CALLED = ("__call__", "__getattr__")
"""Special members of classes that are compared; Python creates all others itself."""

NOTHING: Any = type("Nothing", (), {"__repr__": lambda self: "nothing"})()
"""The value of an entry that does not exist."""


@dataclass(frozen=True)
class Difference:
    """An entry whose value has changed. holder: the class, or the dict of the object, with the entry. number: the index
    of the holder."""

    number: int
    holder: Any
    name: str
    before: Any
    now: Any

    def set(self, value: Any) -> None:
        """Set the entry to a value."""
        if not isinstance(self.holder, type):
            self.holder.pop(self.name, None) if value is NOTHING else self.holder.update({self.name: value})
        elif value is NOTHING:
            delattr(self.holder, self.name)
        else:
            setattr(self.holder, self.name, value)

    def kept(self) -> Difference:
        """Return the same, whatever is put into a collection later."""
        return replace(self, now=_copied_value(self.now))


class Snapshot:
    """Copy of the members of classes, or of the attributes of objects (given as their dicts).

    `changed` compares whole dicts, which compare identities first.
    """

    def __init__(self, holders: Iterable[Any]):
        self.holders = list(holders)
        self._now = [vars(holder) if isinstance(holder, type) else holder for holder in self.holders]
        self._before = list(map(_copied, self._now))

    def changed(self) -> bool:
        """Return whether any entry may have changed."""
        return bool(self._changed_holders())

    def differences(self) -> list[Difference]:
        """Return the changed entries that can affect computation."""
        return [
            Difference(number, self.holders[number], name, before.get(name, NOTHING), now.get(name, NOTHING))
            for number in self._changed_holders()
            for now, before in [(self._now[number], self._before[number])]
            for name in sorted({**before, **now})
            if _is_relevant(name, isinstance(self.holders[number], type))
            and _differs(before.get(name, NOTHING), now.get(name, NOTHING))
        ]

    def update(self) -> None:
        """Replace the snapshot by the present values."""
        for number in self._changed_holders():
            self._before[number] = _copied(self._now[number])

    def _changed_holders(self) -> list[int]:
        pairs = zip(self._now, self._before, strict=True)
        try:
            if self._now == self._before:
                return []
            return [number for number, (now, before) in enumerate(pairs) if now != before]
        except Exception:  # values that cannot be compared, such as tensors and arrays
            return [number for number, (now, before) in enumerate(pairs) if not _alike(now, before)]


def _alike(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return now.keys() == before.keys() and not any(_differs(before[name], value) for name, value in now.items())


def _copied(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries with copies of collections, which may be changed in place."""
    return {name: value if name in OF_MODULES else _copied_value(value) for name, value in entries.items()}


def _copied_value(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, set) else value


def _is_relevant(name: str, of_class: bool) -> bool:
    """Return whether an entry of this name can affect computation."""
    if of_class:
        return not (name.startswith(("__", "_abc_")) and name not in CALLED)
    return name not in OF_MODULES


def _differs(before: Any, now: Any) -> bool:
    """Return whether a setting has changed: numbers, strings, functions and other callables, collections of those."""
    if before is now:
        return False
    if type(before) is type(now) and isinstance(now, (*PLAIN, *COLLECTIONS)):
        if isinstance(now, COLLECTIONS):
            return is_setting(now) and (not is_setting(before) or before != now)
        return before != now and not (before != before and now != now)
    return any(value is not NOTHING and is_setting(value) for value in (before, now))


def is_setting(value: Any) -> bool:
    """Return whether a value can be a setting."""
    if isinstance(value, COLLECTIONS):
        return len(value) <= MAX_ITEMS and all(isinstance(item, PLAIN) for item in _items(value))
    return isinstance(value, PLAIN) or (not isinstance(value, nn.Module) and _is_code(value))


def is_object(value: Any) -> bool:
    """Return whether a value is an object of other attributes, which may be settings: no module, tensor, class or
    function."""
    known = (*PLAIN, *COLLECTIONS, nn.Module, torch.Tensor, torch.Generator, type, ModuleType)
    return hasattr(value, "__dict__") and not isinstance(value, known) and not callable(value)


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, (FunctionType, property, staticmethod, classmethod))


def _items(collection: Any) -> Iterator[Any]:
    for item in collection.values() if isinstance(collection, dict) else collection:
        yield from _items(item) if isinstance(item, COLLECTIONS) else (item,)
