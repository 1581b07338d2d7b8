"""Calls in flight, and the requests that make them; the request loop runs both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from shardit.core.runtime.coroutine import Coroutine
from shardit.core.runtime.thread_state import Generators


class Flight(Protocol):
    """One call in flight, cut into segments; segment k runs on stage owners[k]."""

    finished: bool

    @property
    def owners(self) -> Sequence[int]:
        """The stage of each segment."""
        ...

    def begin(self) -> None:
        """Run what comes before the first segment; on its owner also the first segment, and send."""
        ...

    def run(self, segment: int) -> None:
        """On the owner: take what hop segment - 1 brought, run the segment, send."""
        ...

    def post(self, segment: int) -> None:
        """On the owner of segment + 1: post the receive of the hop that follows `segment`."""
        ...

    def finish(self) -> None:
        """After the last segment: its owner sends the result back, all others post the receive of it."""
        ...


class Interrupted(Exception):
    """Ends a program at the beginning of a turn, on request."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice. On CPUs torch has it only in the text of a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@dataclass(eq=False)
class Program:
    """One request: a function to run, the seed of its global generators, and what became of it. seed: None if it draws
    nothing from global generators, which then stay as they are.

    start: a checksum of what its first transformer call is given, the same on every rank that drew the same noise;
    at the end also of the states of its global generators.
    Setting `interrupted`, on every rank between the same two turns, ends it at its next turn with Interrupted.
    """

    run: Callable[[], Any]
    seed: int | None
    value: Any = None
    error: Exception | None = None
    turns: int = 0
    yielded_at: int = 0
    start: str | None = None
    interrupted: bool = False
    coroutine: Coroutine | None = field(default=None, repr=False)
    generators: Generators | None = field(default=None, repr=False)
    waits_for: Flight | None = field(default=None, repr=False)
