"""Coroutines that own their torch state: thread-local state of torch must not leak from one to the next."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable
from typing import Any

import greenlet
import torch

from shardit.core.runtime.thread_state import TorchState

_set_eval_frame: Callable[[Any], Any] | None = None
"""torch's own, once torch.compile has been imported; an import statement in each switch would take longer than the
switch."""


def _compile_frames(callback: Any) -> Any:
    """Set the frame callback of torch.compile for frames of Python code that begin from now on; return the previous
    one."""
    global _set_eval_frame
    if _set_eval_frame is None:
        if "torch._dynamo" not in sys.modules:
            return None
        from torch._C._dynamo.eval_frame import set_eval_frame as _set_eval_frame
    return _set_eval_frame(callback)


class Coroutine:
    """A function that runs in pieces: `resume` runs it until it calls `pause`, returns or raises.

    Modes that the function enters stay its own: at each switch they are removed from the thread and restored later.
    """

    def __init__(self, function: Callable[[], Any]):
        self._function = function
        self._greenlet = greenlet.greenlet(self._run)
        self._greenlet.gr_context = contextvars.copy_context()  # a new greenlet's would be empty
        self._state = TorchState.capture()
        self.value: Any = None
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether the function has returned or raised."""
        return self._greenlet.dead

    def _run(self) -> None:
        function = self._function
        del self._function  # it may refer to this coroutine: a cycle would keep memory until the garbage collector runs
        try:
            self.value = function()
        except greenlet.GreenletExit:
            raise
        except BaseException as error:  # raised again in `resume`
            self.error = error
        finally:
            self._state = TorchState.capture()

    def resume(self) -> None:
        """Run until the next pause or the end, under the coroutine's own state. Raises the exceptions of the
        function."""
        compiling = _compile_frames(None)
        try:
            self._enter(self._greenlet.switch)
        finally:
            _compile_frames(compiling)
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _enter(self, switch: Callable[[], Any]) -> None:
        """Go into the coroutine under its own state, and come back under the present one."""
        self._greenlet.parent = greenlet.getcurrent()
        outer = TorchState.capture()
        # The guard restores absolute values on exit, so guards of several coroutines need not nest, and the mode of a
        # paused coroutine is gone from the thread.
        with torch.inference_mode(self._state.inference):
            self._state.install(outer)
            try:
                switch()
            finally:
                outer.install(self._state)

    def pause(self) -> None:
        """Inside the coroutine: return control to `resume`'s caller."""
        if greenlet.getcurrent() is not self._greenlet:
            raise RuntimeError("a coroutine can only pause itself: a forward waits for the result of another call")
        self._state = TorchState.capture()
        parent = self._greenlet.parent
        assert parent is not None
        compiling = _compile_frames(None)  # between the pieces of this coroutine's code that torch has compiled
        parent.switch()
        _compile_frames(compiling)

    def kill(self, error: BaseException | None = None) -> None:
        """End the coroutine where it is paused, by an exception inside it that is not raised further."""
        if not self._greenlet:  # never started: nothing to unwind
            error = None
        if not self._greenlet.dead:
            self._enter(lambda: self._greenlet.throw(error or greenlet.GreenletExit()))
