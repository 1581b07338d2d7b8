"""Holders of state: modules, objects, lists and dicts, functions with their variables, classes.

Their entries are read and set uniformly, by keys: attributes and variables by name, all others by pairs.
"""

from __future__ import annotations

import enum
import functools
import inspect
import numbers
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from shardit.core.modules.patching import SWAPPED
from shardit.errors import UnsupportedError

OWN = frozenset(vars(nn.Module()))
"""Attributes of every module."""

TENSORS_OF = ("_parameters", "_buffers")

LIBRARIES = frozenset({"torch", "shardit", "numpy", "builtins", "functools", "logging", "threading", "importlib", "io"})
"""Packages whose functions and objects keep no state that affects results."""

VALUES = frozenset({"pathlib", "datetime", "uuid", "re", "typing", "inspect", "abc", "weakref", "contextlib"})
"""Packages whose objects are immutable except for internal caches."""

_NO_CLASSES = LIBRARIES | sys.stdlib_module_names

FUNCTIONS = (FunctionType, MethodType, functools.partial)
COLLECTIONS = (list, dict, set, deque)
FIXED = (tuple, frozenset)
PLAIN = (
    bool, int, float, str, bytes, type(None), torch.Size, torch.dtype, torch.device, slice, range, enum.Enum,
    ModuleType, BuiltinFunctionType, numbers.Number,
)  # fmt: skip
"""Immutable types, compared by value."""

Entries = dict[Any, Any]


def origin(thing: Any) -> str:
    """Return the package in which a class was defined."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _function_origin(function: FunctionType) -> str:
    """Return the package in which a function was defined, ignoring the function that it wraps."""
    return str(function.__globals__.get("__name__", "")).partition(".")[0]


def of_library(value: Any) -> bool:
    """Return whether a value is an object of an installed model library."""
    package = origin(type(value))
    return package not in _NO_CLASSES and _installed(package)


@functools.cache
def _installed(package: str) -> bool:
    """Return whether a package is installed, not a user's own code."""
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return package in _NO_CLASSES or "site-packages" in file or "dist-packages" in file


def is_holder(value: Any) -> bool:
    """Return whether a value may hold state of a user or a model. Internals of torch, Python and this package do
    not."""
    if isinstance(value, (*COLLECTIONS, nn.Module)):
        return True
    if isinstance(value, type):
        return origin(value) not in _NO_CLASSES or hasattr(value, SWAPPED)
    if isinstance(value, FunctionType):
        return _function_origin(value) not in LIBRARIES
    if isinstance(value, (*PLAIN, *FIXED, *FUNCTIONS, torch.Tensor)):
        return False
    if isinstance(value, GeneratorType):
        return True
    return origin(type(value)) not in LIBRARIES | VALUES and (hasattr(value, "__dict__") or any(_slots(type(value))))


def entries(holder: Any) -> Entries:
    """Return the present entries of a holder."""
    if isinstance(holder, FunctionType):
        return _variables(holder)
    if isinstance(holder, type):
        return {name: value for name, value in vars(holder).items() if _is_data(name, value)}
    if isinstance(holder, GeneratorType):
        return {"state": inspect.getgeneratorstate(holder), **inspect.getgeneratorlocals(holder)}
    if isinstance(holder, nn.Module):
        own = vars(holder)
        found: Entries = {name: value for name, value in own.items() if name not in OWN}
        return found | {(kind, name): tensor for kind in TENSORS_OF for name, tensor in own[kind].items()}
    if isinstance(holder, dict):
        found = {("item", key): value for key, value in dict.items(holder)}
    elif isinstance(holder, (list, deque)):
        found = {("item", number): value for number, value in enumerate(holder)}
    else:
        found = {("member", member): member for member in holder} if isinstance(holder, set) else {}
    return found | _attributes(holder)


def _attributes(holder: Any) -> Entries:
    slots = {name: getattr(holder, name) for name in _slots(type(holder)) if hasattr(holder, name)}
    return {**slots, **getattr(holder, "__dict__", {})}


def _slots(cls: type) -> Iterator[str]:
    for one in cls.__mro__ if origin(cls) not in LIBRARIES else ():
        names = vars(one).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if not name.startswith("__"):
                yield name


def _is_data(name: str, value: Any) -> bool:
    """Return whether a member of a class is data, not code."""
    return not name.startswith(("__", "_abc_")) and not hasattr(type(value), "__get__") and not isinstance(value, type)


def _variables(function: FunctionType) -> Entries:
    """Return the variables of a function: its closure, the module globals that its code names, its defaults and its own
    attributes."""
    found: Entries = {("cell", name): cell.cell_contents for name, cell in _cells(function).items()}
    found |= {("global", name): function.__globals__[name] for name in _globals_of(function)}
    found |= {("default", number): value for number, value in enumerate(function.__defaults__ or ())}
    found |= {("default", name): value for name, value in (function.__kwdefaults__ or {}).items()}
    return found | {name: value for name, value in vars(function).items() if name != "__wrapped__"}


def _cells(function: FunctionType) -> dict[str, CellType]:
    """Return the closure variables of a function that have a value."""
    found = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return {name: cell for name, cell in found.items() if cell != CellType()}


def _globals_of(function: FunctionType) -> Iterator[str]:
    """Yield the module globals that a user's function names, including those that its nested functions name."""
    if _installed(_function_origin(function)):
        return
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        yield from (name for name in code.co_names if name in function.__globals__)


def name_of(path: str, key: Any) -> str:
    """Return the full name of an entry; unnamed members of a collection have the name of the collection."""
    if isinstance(key, tuple) and (key[0] == "member" or not isinstance(key[1], str) or not key[1]):
        return path
    name = str(key[1] if isinstance(key, tuple) else key)
    return f"{path}.{name}" if path else name


def code_of(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the objects that a holder leads to in addition to its entries: submodules, and the code that uses them."""
    if isinstance(holder, nn.Module):
        yield from holder._modules.items()
    if isinstance(holder, FunctionType):
        yield ("item", ""), vars(holder).get("__wrapped__")
    elif not isinstance(holder, type):
        yield ("item", ""), type(holder)
    elif not _installed(origin(holder)):
        yield from ((("item", ""), one) for one in (*holder.__bases__, *vars(holder).values()))


def unpacked(value: Any) -> Iterator[Any]:
    """Yield the objects inside a value that is no holder: members of a tuple, the object of a method, a wrapped
    function."""
    if isinstance(value, FIXED):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        yield vars(value).get("__wrapped__")
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, property):
        yield value.fget


def put_entries(holder: Any, before: Entries, now: Entries) -> None:
    """Restore the earlier entries of a holder."""
    if isinstance(holder, GeneratorType):
        raise UnsupportedError(
            "a call advances a Python generator, which cannot be restored after a trial call: keep numbers instead"
        )
    function: Any = holder
    if isinstance(holder, COLLECTIONS):
        _put_items(holder, [(key[1], value) for key, value in before.items() if isinstance(key, tuple)])
    changed = {k: v for k, v in before.items() if now.get(k, now) is not v}
    changed |= {key: None for key in now if key not in before}
    for key in changed:
        if isinstance(key, str):
            _put_attribute(holder, key, before)
        elif key[0] in TENSORS_OF:
            tensors = vars(holder)[key[0]]
            tensors.pop(key[1], None)
            tensors.update({key[1]: before[key]} if key in before else {})
        elif key[0] == "cell" and key in before:
            _cells(function)[key[1]].cell_contents = before[key]
        elif key[0] == "global" and key in before:
            function.__globals__[key[1]] = before[key]


def _put_attribute(holder: Any, name: str, before: Entries) -> None:
    own = getattr(holder, "__dict__", {})
    if isinstance(holder, type):
        setattr(holder, name, before[name]) if name in before else delattr(holder, name)
    elif name not in before:
        own.pop(name, None) if name in own else object.__delattr__(holder, name)
    elif name in own or name not in _slots(type(holder)):
        own[name] = before[name]
    else:
        object.__setattr__(holder, name, before[name])


def _put_items(holder: Any, items: list[tuple[Any, Any]]) -> None:
    if isinstance(holder, dict):
        kind: Any = OrderedDict if isinstance(holder, OrderedDict) else dict
        kind.clear(holder)
        for key, value in items:
            kind.__setitem__(holder, key, value)
        return
    holder.clear()
    values = [value for _, value in items]
    holder.update(values) if isinstance(holder, set) else holder.extend(values)
