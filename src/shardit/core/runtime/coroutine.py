"""Coroutines that own their torch state: what is thread-local in torch must not leak from one to the next."""

from __future__ import annotations

import contextvars
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import greenlet
import numpy
import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _device
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode


@dataclass
class TorchState:
    """Grad, inference and autocast modes, function and dispatch modes of one coroutine, while it is not running.

    default_device: what `torch.set_default_device` remembers beside the function mode that does the work.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    function_modes: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]
    default_device: tuple[Any, Any]

    @staticmethod
    def capture() -> TorchState:
        """The state of the running coroutine."""
        return TorchState(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _kinds()),
            torch.is_autocast_cache_enabled(),
            tuple(_get_current_function_mode_stack()),
            tuple(_get_current_dispatch_mode_stack()),
            (getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None), _device.CURRENT_DEVICE),
        )

    def install(self) -> None:
        """Make this the state of the running coroutine (inference mode is set by the caller's guard)."""
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            if enabled != torch.is_autocast_enabled(kind):
                torch.set_autocast_enabled(kind, enabled)
            if dtype != torch.get_autocast_dtype(kind):
                torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        _replace(_get_current_function_mode_stack(), self.function_modes, _pop_mode, _push_mode)
        _replace(_get_current_dispatch_mode_stack(), self.dispatch_modes, _pop_dispatch_mode, _push_dispatch_mode)
        torch._GLOBAL_DEVICE_CONTEXT.device_context, _device.CURRENT_DEVICE = self.default_device


def _kinds() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _replace(current: Any, wanted: tuple[Any, ...], pop: Callable[[], Any], push: Callable[[Any], Any]) -> None:
    current = list(current)
    if len(current) == len(wanted) and all(a is b for a, b in zip(current, wanted, strict=True)):
        return
    for _ in current:
        pop()
    for mode in wanted:
        push(mode)


def _compile_frames(callback: Any) -> Any:
    """Set what torch.compile does to frames of Python code that begin from now on; returns what was set before."""
    if "torch._dynamo" not in sys.modules:
        return None
    from torch._C._dynamo.eval_frame import set_eval_frame

    return set_eval_frame(callback)


class Coroutine:
    """A function that runs in pieces: `resume` runs it until it calls `pause`, returns or raises.

    Modes that the function enters stay its own: at each switch they are taken off the thread and put back later.
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
        del self._function  # it may know of this coroutine: a cycle would keep memory until the garbage collector comes
        try:
            self.value = function()
        except greenlet.GreenletExit:
            raise
        except BaseException as error:  # handed to whoever resumes
            self.error = error
        finally:
            self._state = TorchState.capture()

    def resume(self) -> None:
        """Run until the next pause or the end, under the coroutine's own state. Raises what the function raised."""
        self._greenlet.parent = greenlet.getcurrent()
        outer, compiling = TorchState.capture(), _compile_frames(None)
        # The guard restores absolute values when it goes, so guards of several coroutines need not nest, and whatever
        # mode the coroutine is in when it pauses is gone from the thread.
        with torch.inference_mode(self._state.inference):
            self._state.install()
            try:
                self._greenlet.switch()
            finally:
                outer.install()
                _compile_frames(compiling)
        outer.install()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def pause(self) -> None:
        """Called inside the coroutine: give control back to `resume`'s caller."""
        if greenlet.getcurrent() is not self._greenlet:
            raise RuntimeError("a coroutine can only pause itself: a forward waits for the result of another call")
        self._state = TorchState.capture()
        parent = self._greenlet.parent
        assert parent is not None
        compiling = _compile_frames(None)  # between the pieces that torch has compiled of this coroutine's code
        parent.switch()
        _compile_frames(compiling)

    def kill(self, error: BaseException | None = None) -> None:
        """End the coroutine where it is paused, by an exception inside it, which goes no further."""
        if not self._greenlet:  # never started: nothing to unwind
            error = None
        if not self._greenlet.dead:
            self._greenlet.parent = greenlet.getcurrent()
            outer = TorchState.capture()
            with torch.inference_mode(self._state.inference):
                self._state.install()
                try:
                    self._greenlet.throw(error or greenlet.GreenletExit())
                finally:
                    outer.install()
            outer.install()


willing: contextvars.ContextVar[Coroutine | None] = contextvars.ContextVar("shardit_willing", default=None)
"""The coroutine that runs, if it lets others compute while it would only wait."""


def yield_while_waiting() -> None:
    """Called between the start of something slow and the wait for it: let others compute meanwhile, if any may."""
    coroutine = willing.get()
    if coroutine is not None:
        coroutine.pause()


@dataclass
class Generators:
    """States of the global random generators that belong to one request."""

    torch_cpu: torch.Tensor
    devices: tuple[torch.Tensor, ...]
    python: Any
    numpy: Any

    @staticmethod
    def capture() -> Generators:
        """The states as they are now."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return Generators(torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state())

    def install(self) -> None:
        """Set the global generators to these states."""
        torch.set_rng_state(self.torch_cpu)
        if self.devices:
            torch.cuda.set_rng_state_all(list(self.devices))
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
