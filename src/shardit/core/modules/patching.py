"""Patches modules in place: a subclass of the own class, calls of blocks that can be intercepted, tensors replaced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from shardit.errors import UnsupportedError

SWAPPED = "shardit_swapped"
"""An attribute of the classes that are made here."""


class Interceptor(Protocol):
    """Decides what a block call does while a forward of its model runs."""

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called instead of block number `index`; `call` is the block's own `__call__`."""
        ...


def subclass_in_place(module: Any, members: dict[str, Any]) -> None:
    """Give a module a subclass of its own class, with the same name and the given members, in place.

    The subclass is no wrapper: names, indices, isinstance, LoRA keys and checkpoints stay as they are. And it
    is at `__call__`, outside everything that replaces `forward` (compile, accelerate and cache hooks).
    """
    cls = type(module)
    known = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, SWAPPED: True}
    members = {**known, **members}
    module.__class__ = type(cls.__name__, (cls,), members)


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


class BlockCalls:
    """The calls of the blocks of one model. interceptor: gets them now; None lets blocks run as if nothing had been
    done."""

    __slots__ = ("interceptor",)

    def __init__(self) -> None:
        self.interceptor: Interceptor | None = None

    @contextmanager
    def intercepted_by(self, interceptor: Interceptor | None) -> Iterator[None]:
        """Hand the calls to another interceptor for a while."""
        before, self.interceptor = self.interceptor, interceptor
        try:
            yield
        finally:
            self.interceptor = before


def install(blocks: list[tuple[str, nn.Module]], calls: BlockCalls) -> None:
    """Make the calls of all blocks interceptable."""
    for index, (_, block) in enumerate(blocks):
        subclass_in_place(block, {"__call__": _interceptable(type(block).__call__, index, calls)})


def _interceptable(own_call: Any, index: int, calls: BlockCalls) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        interceptor = calls.interceptor
        if interceptor is None:
            return own_call(self, *args, **kwargs)
        return interceptor.block_call(index, own_call.__get__(self), args, kwargs)

    return __call__


def put(module: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or a buffer of a module, or of one below it, by another of its kind."""
    *parents, leaf = path.split(".")
    for name in parents:
        module = getattr(module, name)
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
