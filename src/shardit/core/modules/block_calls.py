"""Calls of blocks that can be intercepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from shardit.core.modules.patching import subclass_in_place


class Interceptor(Protocol):
    """Decides what a block call does while a forward of its model runs."""

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called instead of block number `index`; `call` is the block's own `__call__`."""
        ...


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
