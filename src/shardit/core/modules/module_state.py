"""State that modules, attention processors, hooks and functions keep from call to call: put back after a trial,
compared, named."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from shardit.core.modules.hooks import from_outside

OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

SMALL = 4096
"""Elements of the largest buffers whose content counts as state (counters); larger ones are tables."""


DEPTH = 4
"""How deep in objects state is looked for."""

FUNCTIONS = (FunctionType, MethodType, functools.partial)

LIBRARIES = ("torch", "shardit")
"""Packages whose functions and objects keep nothing that changes results."""

COLLECTIONS = (list, dict, tuple)

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.dtype, torch.device)


@dataclass(frozen=True)
class Thing:
    """A module, an object that one has, or the variables that a function has enclosed: its attributes, their values at
    one time, what lists, dicts and sets among them held, and copies of its small buffers. cells: where the variables
    of a function are. outside: it is reached only through hooks and functions that users have put on modules."""

    path: str
    attributes: dict[str, Any]
    values: dict[str, Any]
    contents: dict[str, Any]
    buffers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    cells: dict[str, CellType] = field(default_factory=dict)
    outside: bool = False


State = list[Thing]


def state_of(model: nn.Module) -> State:
    """The attributes of a model's modules and of their processors, the contents of small buffers, and what hooks and
    functions that users have put on modules enclose."""
    seen: set[int] = set()
    things = [_look(path, thing) for path, thing in _things(model, seen)]
    return things + [_look(path, thing, outside=True) for path, thing in _put_on(model, seen)]


def _things(model: nn.Module, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The modules, and the objects that their attributes lead to: processors, hooks with their state."""
    for path, module in model.named_modules():
        yield path, module
        for name, value in vars(module).items():
            if name not in OWN and not isinstance(value, FUNCTIONS):
                yield from _objects(f"{path}.{name}" if path else name, value, DEPTH, seen)


def _put_on(model: nn.Module, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """What the hooks of a model's modules, and functions in place of their methods, lead to."""
    for path, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        found = [("hook", hook) for hook in hooks if from_outside(hook)]
        found += [(name, value) for name, value in vars(module).items() if isinstance(value, FUNCTIONS)]
        for name, value in found:
            yield from _objects(f"{path}.{name}" if path else name, value, DEPTH, seen)


def _objects(path: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    while isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, MethodType):
        value = value.__self__
    if isinstance(value, FunctionType):
        if id(value) not in seen and value.__closure__ and depth and _home(value) not in LIBRARIES:
            seen.add(id(value))
            yield path, value
            for name, cell in _cells(value).items():
                if not isinstance(cell.cell_contents, PLAIN):
                    yield from _objects(f"{path}.{name}", cell.cell_contents, depth - 1, seen)
    elif isinstance(value, (dict, list, tuple)):
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
    return hasattr(value, "__dict__") and _home(type(value)) not in (*LIBRARIES, "builtins", "types", "functools")


def _home(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _cells(function: FunctionType) -> dict[str, CellType]:
    """The variables that a function has enclosed and that have a value."""
    found = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return {name: cell for name, cell in found.items() if cell != CellType()}


def _look(path: str, thing: Any, outside: bool = False) -> Thing:
    cells = _cells(thing) if isinstance(thing, FunctionType) else {}
    attributes = {name: cell.cell_contents for name, cell in cells.items()} if cells else thing.__dict__
    held = {k: copy.copy(v) for k, v in attributes.items() if k not in OWN and type(v) in (list, dict, set)}
    buffers = attributes.get("_buffers", {}) if isinstance(thing, nn.Module) else {}
    small = {k: b for k, b in buffers.items() if b is not None and not b.is_meta and b.numel() <= SMALL}
    copies = {k: (b, b.detach().clone()) for k, b in small.items()}
    return Thing(path, attributes, dict(attributes), held, copies, cells, outside)


def restore(state: State) -> None:
    """Undo what was set and put in since."""
    for thing in state:
        for name, cell in thing.cells.items():
            if cell.cell_contents is not thing.values[name]:
                cell.cell_contents = thing.values[name]
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


def poison(state: State, names: Collection[str]) -> None:
    """Put NaN in place of all numbers in the tensors of the attributes of these full names, so that a result shows
    whether they are read. `restore` of the same state brings them back."""
    for thing in state:
        for name, value in thing.values.items():
            if f"{thing.path}.{name}" not in names:
                continue
            bad = tree_map_only(torch.Tensor, _bad, value) if isinstance(value, (torch.Tensor, *COLLECTIONS)) else value
            if bad is not value and name in thing.cells:
                thing.cells[name].cell_contents = bad
            elif bad is not value:
                thing.attributes[name] = bad


def _bad(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor


def differences(before: State, after: State, outside: bool = False) -> list[str]:
    """The full names of attributes that have other values in the later state: other numbers and texts, other objects,
    collections of others, buffers of other content. `outside`: those of things that are `outside`, in place of the
    others."""
    found, olds = [], {thing.path: thing for thing in before}
    for new in (thing for thing in after if thing.outside == outside):
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
