"""Interception of block calls."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from shardit.core.modules.compiled import never_compiled
from shardit.core.modules.patching import subclass_in_place
from shardit.errors import UnsupportedError


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
    are called through an interceptor only. Code in torch.compile around a block does not trace the interceptor."""
    for index, (name, block) in enumerate(blocks):
        subclass_in_place(block, {"__call__": _interceptable(type(block).__call__, index, calls)})
        if index in missing:
            subclass_in_place(block, {"__call__": _missing(type(block).__call__, name, calls)})


def _interceptable(own_call: Any, index: int, calls: BlockCalls) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        interceptor = calls.interceptor
        if interceptor is None:
            return own_call(self, *args, **kwargs)
        return interceptor.block_call(index, own_call.__get__(self), args, kwargs)

    return never_compiled(__call__)


def _missing(intercepted_call: Any, name: str, calls: BlockCalls) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if calls.interceptor is None:
            raise UnsupportedError(f"{name} is on another rank: call the model itself, not its forward() or a block")
        return intercepted_call(self, *args, **kwargs)

    return __call__
