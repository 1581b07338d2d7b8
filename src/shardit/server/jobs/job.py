"""A job: one accepted request, from the moment it is stored until its one end."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Kind = Literal["image", "video", "generation"]

OPEN: tuple[State, ...] = ("queued", "in_progress")
ENDED: tuple[State, ...] = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class NewJob:
    """What the HTTP side asks the store to accept.

    request: what `build_requests` takes, as JSON values: {"prompt": ..., "seed": ..., ...}; input pictures
    are files, named in `inputs`. view: what the answer repeats to the client (size, seconds, quality ...).
    """

    kind: Kind
    request: Mapping[str, Any]
    seed: int
    cost: float
    """Seconds that it is expected to take; decides its place in the queue."""
    inputs: Mapping[str, bytes] = field(default_factory=dict)
    """Input pictures by file name, as they came, checked."""
    view: Mapping[str, Any] = field(default_factory=dict)
    owner: str | None = None
    """Which API key sent it; None without keys."""
    priority: int = 0
    """Each step is worth `PRIORITY_S` seconds of waiting."""
    waits: bool = False
    """A client waits on its connection for the result: without it the job is cancelled."""
    idempotency_key: str | None = None
    fingerprint: str = ""
    """Digest of the request, which tells a repeated idempotency key from a misused one."""


@dataclass(frozen=True)
class Job:
    """A stored job. Times are seconds since 1970; numbers rise in the order of acceptance."""

    number: int
    id: str
    kind: Kind
    state: State
    request: dict[str, Any]
    seed: int
    view: dict[str, Any]
    created_at: float
    due: float
    owner: str | None = None
    waits: bool = False
    inputs: tuple[str, ...] = ()
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0
    """How often ranks have begun it."""
    deaths: int = 0
    """How often ranks have died while it ran."""
    deaths_alone: int = 0
    """How often nothing else ran at that time, so that only this job can be the cause, if a job is."""
    cancel_requested: bool = False
    error: dict[str, Any] | None = None
    """{"code": ..., "message": ...} of a failed job."""
    files: tuple[str, ...] = ()
    """Names of the results in the job's folder, in order."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was seen: seconds, peak_bytes, notes."""
    bytes: int = 0
    """Size of inputs and results."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED


PRIORITY_S = 600.0
"""Seconds by which one step of priority moves a job forward."""


def new_id(kind: Kind) -> str:
    """A name that cannot be guessed."""
    return f"{kind}_{secrets.token_hex(16)}"


def is_id(name: str) -> bool:
    """Whether `new_id` may have made this name."""
    return re.fullmatch(r"(image|video|generation)_[0-9a-f]{32}", name) is not None


def due_time(accepted_at: float, cost: float, priority: int) -> float:
    """The place of a job in the queue: the lowest goes first, and it never changes.

    Of jobs that come together the short one goes first; a long one is overtaken only by those that come within its own
    cost after it, so that nothing waits for ever.
    """
    return accepted_at + cost - priority * PRIORITY_S
