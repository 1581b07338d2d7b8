"""Calls of the model without gradients, such as those of a teacher inside a loss.

All stages run such a call together, block by block, and every rank gets its result. Those of a loss run before the
schedule; its forwards then get the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from shardit.core.comm.p2p import Comm
from shardit.core.modules.blocks import CutModel
from shardit.core.modules.patching import subclass_in_place
from shardit.core.plans.traced_call import TracedCall
from shardit.errors import UnsupportedError


class _StopLoss(BaseException):
    """Leaves a loss at its first block call with gradients. Not an Exception: models may catch those."""


class PlainCalls:
    """Intercepts the calls of one model. whole: every rank has all blocks."""

    def __init__(self, cut: CutModel, comm: Comm):
        self.cut, self.comm, self.whole = cut, comm, True
        self._begun: Callable[[], bool] = lambda: False
        self._replay: list[Any] | None = None
        self._record: list[Any] | None = None
        own_call = type(cut.model).__call__

        def __call__(model: Any, *args: Any, **kwargs: Any) -> Any:
            return self._call(own_call, model, args, kwargs)

        subclass_in_place(cut.model, {"__call__": __call__})

    def _call(self, own_call: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            if self.cut.calls.interceptor is None and not self.whole:
                raise UnsupportedError(
                    f"{self.cut.name} is called with gradients outside of step(), but each stage has a part of it: "
                    "call it in the loss, or under torch.no_grad() on all ranks"
                )
            return own_call(model, *args, **kwargs)
        if self._replay:
            return self._replay.pop(0)
        if self._begun():
            raise UnsupportedError(
                f"a loss calls {self.cut.name} without gradients after a call with gradients: change the order"
            )
        if self.whole and self._record is None:
            return own_call(model, *args, **kwargs)
        out = self._together(own_call, model, args, kwargs)
        if self._record is not None:
            self._record.append(out)
        return out

    def _together(self, own_call: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls = TracedCall(self.cut, self.comm)
        with self.cut.calls.intercepted_by(calls), without_modes():
            out = own_call(model, *args, **kwargs)
        torch.clear_autocast_cache()  # holds weights that were cast without gradients
        return out

    @contextmanager
    def recorded(self, begun: Callable[[], bool] = lambda: False) -> Iterator[list[Any]]:
        """Collect the results of the calls without gradients. begun: whether there was a block call with gradients."""
        self._record, self._begun = [], begun
        try:
            yield self._record
        finally:
            self._record, self._begun = None, lambda: False

    @contextmanager
    def replayed(self, results: list[Any]) -> Iterator[None]:
        """Return results that were collected before, in order."""
        self._replay = list(results)
        try:
            yield
        finally:
            self._replay = None

    def collect(self, loss: Callable[[], Any]) -> list[Any]:
        """Run a loss up to its first block call with gradients; return the results of its calls before. Collective."""
        with self.recorded() as results, self.cut.calls.intercepted_by(_Stop()):
            with suppress(_StopLoss):
                loss()
        return results


class _Stop:
    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise _StopLoss
