"""State of attention processors: a block call leaves it outside of tensors, on the owner of the block."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from shardit.core.modules.fingerprint import PROCESSOR

_DEPTH = 8
"""How deep objects, dicts and lists are looked into."""


def held_state(block: nn.Module) -> dict[str, Any]:
    """A snapshot of what the attention processors in a block hold, by the path of the processor. Two snapshots of a
    block are equal where nothing was written in between."""
    found = {path: _attributes(one) for path, one in _processors(block) if not isinstance(one, nn.Module)}
    return {path: _snapshot(attributes, _DEPTH) for path, attributes in found.items() if attributes is not None}


def snapshot(value: Any) -> Any:
    """A snapshot of an object with what it holds."""
    return _snapshot(value, _DEPTH)


def processor_classes(model: nn.Module) -> set[type]:
    """The classes of a model's attention processors."""
    return {type(processor) for _, processor in _processors(model)}


def _processors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in module.named_modules():
        processor = getattr(part, PROCESSOR, None)
        if processor is not None:
            yield path, processor


def _attributes(value: Any) -> dict[str, Any] | None:
    """What an object holds, in its dict or in slots; None for what has neither."""
    slots = [name for cls in type(value).__mro__ for name in _names(vars(cls).get("__slots__", ()))]
    if not slots and not hasattr(value, "__dict__"):
        return None
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _snapshot(value: Any, depth: int, above: tuple[int, ...] = ()) -> Any:
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    plain = value is None or isinstance(value, (bool, int, float, str))
    if plain or depth == 0 or id(value) in above or isinstance(value, (type, nn.Module)):
        return value if plain else id(value)
    inside = (*above, id(value))
    if isinstance(value, dict):
        return {key: _snapshot(entry, depth - 1, inside) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, deque)):
        return [_snapshot(entry, depth - 1, inside) for entry in value]
    attributes = _attributes(value)
    return id(value) if attributes is None else (id(value), _snapshot(attributes, depth - 1, inside))
