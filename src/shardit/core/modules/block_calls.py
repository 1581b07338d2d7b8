"""Interception of block calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from shardit.core.modules.compiled import never_compiled
from shardit.core.modules.patching import number_calls
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
    """Run `handle(number, call, args, kwargs)` instead of calls of modules, numbered from 0; `call` is their own. Code
    of torch.compile does not trace `handle`, and modules of one class share that code."""

    def intercepted(own_call: Any, numbers: Mapping[nn.Module, int]) -> Any:
        def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            number = numbers.get(self)
            own = own_call.__get__(self)
            return own(*args, **kwargs) if number is None else handle(number, own, args, kwargs)

        return never_compiled(__call__)

    number_calls(modules, intercepted)
