"""Patches modules in place: a subclass of the own class, tensors replaced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from shardit.errors import UnsupportedError

SWAPPED = "shardit_swapped"
"""An attribute of the classes that are made here: the names of members that hide those of the class before."""


def subclass_in_place(module: Any, members: dict[str, Any], late: Collection[str] = ()) -> None:
    """Give a module a subclass of its own class, with the same name and the given members, in place.

    The subclass is no wrapper: names, indices, isinstance, LoRA keys and checkpoints stay as they are. And it
    is at `__call__`, outside everything that replaces `forward` (compile, accelerate and cache hooks). late: names of
    members that look up those of the class before when they are called, so that a change of these counts.
    """
    cls = type(module)
    known = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    hiding = frozenset(members.keys() - set(late))
    module.__class__ = type(cls.__name__, (cls,), {**known, **members, SWAPPED: hiding})


CHANGE = ("set_", "load_", "_load_", "unload_", "fuse_", "unfuse_", "enable_", "disable_", "delete_", "add_")
"""How the names of methods begin that change what a model computes."""


def changing_methods(cls: type, first: Callable[[], None]) -> dict[str, Callable[..., Any]]:
    """The methods of a class that change what it computes, each with `first` before it: calls in flight are of the
    model as it was."""

    def method(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def change(self: Any, *args: Any, **kwargs: Any) -> Any:
            first()
            return own(self, *args, **kwargs)

        return change

    names = [name for name in dir(cls) if name.startswith(CHANGE) and not hasattr(nn.Module, name)]
    found = {name: getattr(cls, name) for name in names}
    plain = {name: own for name, own in found.items() if inspect.isfunction(own)}
    return {name: method(own) for name, own in plain.items()}


def plain_class(thing: Any) -> type:
    """The class that something had before `subclass_in_place`."""
    return plain_type(type(thing))


def plain_type(cls: type) -> type:
    """The class from which `subclass_in_place` has derived another."""
    return next(one for one in cls.__mro__ if SWAPPED not in vars(one))


def hides(cls: type, home: type, name: str) -> bool:
    """Return whether a change of a member of `home`, a base of `cls`, has no effect on a class that was made here, or
    took the place of the member of that class."""
    bases = cls.__mro__
    for place, made in enumerate(bases):
        if name in vars(made).get(SWAPPED, ()) and home in bases[place:]:
            between = bases[place + 1 : bases.index(home)]
            if not any(name in vars(base) for base in between):
                return True
    return False


Made = dict[tuple[Any, ...], type]
"""Classes made by `share_subclass`, by what they were made of."""


def share_subclass(module: Any, made: Made, key: tuple[Any, ...], members: Callable[[], dict[str, Any]]) -> None:
    """As `subclass_in_place`, with one class for all modules of a class and key: what is compiled for one fits all."""
    key = (type(module), *key)
    if key not in made:
        subclass_in_place(module, members())
        made[key] = type(module)
    module.__class__ = made[key]


def fixed_place(plain: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A `to` for modules of which some rank has a part on meta: changes of dtype are fine, moves are refused, on every
    rank alike, whatever it has itself."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found: Any = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        target, dtype, _, layout = found
        if target is not None and target.type != device.type:
            raise UnsupportedError("a parallel model cannot be moved: choose the device when it is made parallel")
        changes = {"dtype": dtype, "memory_format": layout}
        changes = {name: value for name, value in changes.items() if value is not None}
        return plain(self, **changes) if changes else self

    return to


def put(module: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or a buffer of a module, or of one below it, by another of its kind."""
    *parents, leaf = path.split(".")
    for name in parents:
        module = getattr(module, name)
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
