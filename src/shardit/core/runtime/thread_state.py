"""State that moves with a coroutine: torch's thread-local state, and the global random generators."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _device
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode

from shardit.errors import InputError


class TorchState(NamedTuple):
    """Grad, inference and autocast modes, function and dispatch modes of one coroutine, while it is not running.

    default_device: the value stored by `torch.set_default_device` in addition to the function mode that applies it.
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
        """Return the state of the running coroutine."""
        return TorchState(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple([(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _kinds()]),
            torch.is_autocast_cache_enabled(),
            tuple(_get_current_function_mode_stack()) if torch._C._len_torch_function_stack() else (),
            tuple(_get_current_dispatch_mode_stack()) if torch._C._len_torch_dispatch_stack() else (),
            (getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None), _device.CURRENT_DEVICE),
        )

    def install(self, present: TorchState) -> None:
        """Make this the state of the running coroutine, whose state is `present` except for grad and inference mode
        (which the caller's guard sets)."""
        torch._C._set_grad_enabled(self.grad)
        if self[2:] == present[2:]:
            return
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        _replace(present.function_modes, self.function_modes, _pop_mode, _push_mode)
        _replace(present.dispatch_modes, self.dispatch_modes, _pop_dispatch_mode, _push_dispatch_mode)
        torch._GLOBAL_DEVICE_CONTEXT.device_context, _device.CURRENT_DEVICE = self.default_device


@functools.cache
def _kinds() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _replace(
    present: tuple[Any, ...], wanted: tuple[Any, ...], pop: Callable[[], Any], push: Callable[[Any], Any]
) -> None:
    if len(present) == len(wanted) and all(a is b for a, b in zip(present, wanted, strict=True)):
        return
    for _ in present:
        pop()
    for mode in wanted:
        push(mode)


@dataclass
class Generators:
    """States of the global random generators that belong to one request."""

    torch_cpu: torch.Tensor
    devices: tuple[torch.Tensor, ...]
    python: Any
    numpy: Any

    @staticmethod
    def capture() -> Generators:
        """Return the present states."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return Generators(torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state())

    @staticmethod
    def seed(seed: int) -> None:
        """Seed the global generators."""
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # seeding every kind of device, as torch.manual_seed does, takes a while
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)

    def install(self) -> None:
        """Set the global generators to these states."""
        torch.set_rng_state(self.torch_cpu)
        if self.devices:
            torch.cuda.set_rng_state_all(list(self.devices))
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)


def refuse_profiler() -> None:
    """Raise InputError under a profiler of torch: its open ranges belong to a thread, and a switch between coroutines
    inside of one kills the process."""
    if torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
        raise InputError(
            "torch.profiler cannot follow calls that run in turns on one rank: profile the plain pipeline, or the "
            "processes from outside"
        )
