"""State that modules and attention processors keep from call to call: put back after a trial, compared, named."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

SMALL = 4096
"""Elements of the largest buffers whose content counts as state (counters); larger ones are tables."""


DEPTH = 4
"""How deep in objects state is looked for."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device)


@dataclass(frozen=True)
class Thing:
    """A module, or an object that one has: its attributes, their values at one time, what lists, dicts and sets among
    them held, and copies of its small buffers."""

    path: str
    attributes: dict[str, Any]
    values: dict[str, Any]
    contents: dict[str, Any]
    buffers: dict[str, tuple[torch.Tensor, torch.Tensor]]


State = list[Thing]


def state_of(model: nn.Module) -> State:
    """The attributes of a model's modules and of their processors, and the contents of small buffers."""
    return [_look(path, thing) for path, thing in _things(model)]


def _things(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules, and the objects that their attributes lead to: processors, hooks with their state."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        yield path, module
        for name, value in vars(module).items():
            if name not in OWN:
                yield from _objects(f"{path}.{name}" if path else name, value, DEPTH, seen)


def _objects(path: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if depth and not isinstance(entry, PLAIN):
                yield from _objects(f"{path}.{key}", entry, depth - 1, seen)
    elif _is_holder(value) and id(value) not in seen:
        seen.add(id(value))
        yield path, value
        for name, entry in vars(value).items() if depth else ():
            if not isinstance(entry, PLAIN):
                yield from _objects(f"{path}.{name}", entry, depth - 1, seen)


def _is_holder(value: Any) -> bool:
    """Whether an object may keep state: not what torch, Python or this package are made of."""
    if isinstance(value, (*PLAIN, nn.Module, type)):
        return False
    home = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and home not in ("torch", "builtins", "types", "functools", "shardit")


def _look(path: str, thing: Any) -> Thing:
    attributes: dict[str, Any] = thing.__dict__
    held = {k: copy.copy(v) for k, v in attributes.items() if k not in OWN and type(v) in (list, dict, set)}
    buffers = attributes.get("_buffers", {}) if isinstance(thing, nn.Module) else {}
    small = {k: b for k, b in buffers.items() if b is not None and not b.is_meta and b.numel() <= SMALL}
    return Thing(path, attributes, dict(attributes), held, {k: (b, b.detach().clone()) for k, b in small.items()})


def restore(state: State) -> None:
    """Undo what was set and put in since."""
    for thing in state:
        same_keys = thing.attributes.keys() == thing.values.keys()
        if not same_keys or any(thing.attributes[k] is not v for k, v in thing.values.items()):
            thing.attributes.clear()
            thing.attributes.update(thing.values)
        for key, held in thing.contents.items():
            container = thing.values[key]
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(held)
        for buffer, content in thing.buffers.values():
            if not torch.equal(buffer, content):
                buffer.copy_(content)


def differences(before: State, after: State) -> list[str]:
    """The full names of attributes that have other values in the later state: other numbers and texts, other objects,
    collections of others, buffers of other content."""
    found, olds = [], {thing.path: thing for thing in before}
    for new in after:
        old = olds.get(new.path, new)
        names = [k for k in {**old.values, **new.values} if k not in OWN and not _same(k, old, new)]
        both = old.buffers.keys() & new.buffers.keys()
        names += [k for k in both if _differs(old.buffers[k][1], new.buffers[k][1])]
        found += [f"{new.path}.{name}" if new.path else name for name in names]
    return found


def _differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or not torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def _same(key: str, old: Thing, new: Thing) -> bool:
    if key not in old.values or key not in new.values:
        return False
    if key in old.contents and key in new.contents:
        one, other = _members(old.contents[key]), _members(new.contents[key])
        return len(one) == len(other) and all(map(_alike, one, other))
    return _alike(old.values[key], new.values[key])


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are one object, or the same numbers or texts. What was multiplied and divided again by a scale
    may differ in its last bit."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, tuple):  # sizes, say
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-9) or (one != one and other != other)
    return isinstance(one, (bool, int, str, bytes, complex)) and one == other


def _members(collection: Any) -> list[Any]:
    return [part for pair in collection.items() for part in pair] if isinstance(collection, dict) else [*collection]
