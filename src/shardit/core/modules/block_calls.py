"""Interception of block calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from shardit.core.modules.patching import subclass_in_place


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
