"""Interception of block calls."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from shardit.core.modules.compiled import never_compiled
from shardit.core.modules.patching import Subclasses, share_subclass
from shardit.errors import UnsupportedError

NUMBERS = "shardit_numbers"
"""Attribute of an interceptor: the number of each module that it was made for."""


class Interceptor(Protocol):
    """Handles the block calls of a model while its forward runs."""

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run instead of block number `index`; `call` is the block's own `__call__`."""
        ...


class BlockCalls:
    """Block calls of one model. interceptor: handles them at present; None runs the blocks unmodified."""

    __slots__ = ("interceptor",)

    def __init__(self) -> None:
        self.interceptor: Interceptor | None = None

    @contextmanager
    def intercepted_by(self, interceptor: Interceptor | None) -> Iterator[None]:
        """Redirect the calls to another interceptor for a while."""
        before, self.interceptor = self.interceptor, interceptor
        try:
            yield
        finally:
            self.interceptor = before


def install(blocks: list[tuple[str, nn.Module]], calls: BlockCalls, missing: Collection[int] = ()) -> None:
    """Make the calls of all blocks interceptable. missing: numbers of the blocks whose weights are on other ranks; they
    are called through an interceptor only."""

    def handle(index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if calls.interceptor is not None:
            return calls.interceptor.block_call(index, call, args, kwargs)
        if index in missing:
            name = blocks[index][0]
            raise UnsupportedError(f"{name} is on another rank: call the model itself, not its forward() or a block")
        return call(*args, **kwargs)

    intercept_calls([block for _, block in blocks], handle)


def intercept_calls(modules: Sequence[nn.Module], handle: Callable[..., Any]) -> None:
    """Run `handle(number, call, args, kwargs)` instead of calls of modules, numbered from 0; `call` is their own.

    Modules of one class stay of one class, so they share what torch.compile makes of their forward; it does not trace
    `handle`.
    """
    numbers, made = weakref.WeakKeyDictionary(zip(modules, itertools.count(), strict=False)), Subclasses()
    for module in modules:
        call = _intercepted(type(module).__call__, numbers, handle)
        share_subclass(module, made, (), functools.partial(dict[str, Any], __call__=call))


def _intercepted(own_call: Any, numbers: Mapping[nn.Module, int], handle: Callable[..., Any]) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        number = numbers.get(self)
        if number is None:  # a copy
            return own_call(self, *args, **kwargs)
        return handle(number, own_call.__get__(self), args, kwargs)

    call = never_compiled(__call__)
    setattr(call, NUMBERS, numbers)
    return call


def is_intercepted(module: nn.Module) -> bool:
    """Return whether the class of a module, which may have been derived again, handles its calls as `intercept_calls`
    has set it up for this module."""
    calls = (vars(cls).get("__call__") for cls in type(module).__mro__)
    return any(module in getattr(call, NUMBERS, ()) for call in calls)
