"""Points at which a call lets others compute: between the start of a slow operation and the wait for it."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from shardit.core.runtime.coroutine import Coroutine

yielding_coroutine: contextvars.ContextVar[Coroutine | None] = contextvars.ContextVar("shardit_yielding", default=None)
"""The running coroutine, if it lets others compute while it waits; else None."""

looking: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("shardit_looking", default=None)
"""A function that is called wherever a coroutine would yield; None for none."""


_OPERATIONS = frozenset(one.__call__.__code__ for one in (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
"""Code of the calls of torch's operations."""


def yield_while_waiting() -> None:
    """Let other coroutines compute between the start of a slow operation and the wait for it. Not inside an operation
    of torch that is written in Python: torch calls it through pybind11, which aborts the process if such calls of one
    thread do not end in reverse order."""
    look, coroutine = looking.get(), yielding_coroutine.get()
    if look is not None:
        look()
    if coroutine is not None and not _inside_operation():
        coroutine.pause()


def _inside_operation() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _OPERATIONS:
            return True
        frame = frame.f_back
    return False


@contextmanager
def without_yielding() -> Iterator[None]:
    """Let no other coroutine compute for a while: modules that calls share are not as they ought to be."""
    tokens = yielding_coroutine.set(None), looking.set(None)
    try:
        yield
    finally:
        yielding_coroutine.reset(tokens[0])
        looking.reset(tokens[1])
