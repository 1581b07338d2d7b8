"""A job: one accepted request, from the moment it is stored until it ends."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Kind = Literal["image", "video", "generation", "text"]

ENDED: tuple[State, ...] = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class NewJob:
    """A new job from the HTTP side for the store.

    request: the arguments of `build_requests` as JSON values: {"prompt": ..., "seed": ..., ...}; input images are
    files, named in `inputs`. view: fields of the request that answers repeat (size, seconds, quality ...).
    """

    kind: Kind
    request: Mapping[str, Any]
    seed: int
    cost: float
    """Expected seconds; decides its place in the queue."""
    inputs: Mapping[str, bytes] = field(default_factory=dict)
    """Input images by file name, unchanged, checked."""
    view: Mapping[str, Any] = field(default_factory=dict)
    owner: str | None = None
    """The API key that sent it; None without keys."""
    priority: int = 0
    """Each step is worth `PRIORITY_S` seconds of waiting."""
    waits: bool = False
    """A client waits on its connection for the result: without it the job is cancelled."""
    idempotency_key: str | None = None
    fingerprint: str = ""
    """Digest of the request and of what makes it; distinguishes a repeated idempotency key from a misused one."""
    id: str = ""
    """Its id, for a sender that follows it from the beginning."""


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
    """Number of times ranks have begun it."""
    deaths: int = 0
    """Number of times ranks have died while it ran."""
    deaths_alone: int = 0
    """The part of `deaths` with no other job running, so that only this job can be the cause, if a job is."""
    cancel_requested: bool = False
    error: dict[str, Any] | None = None
    """{"code": ..., "message": ...} of a failed job."""
    files: tuple[str, ...] = ()
    """Names of the results in the job's folder, in order."""
    details: dict[str, Any] = field(default_factory=dict)
    """Measurements and notes: seconds, peak_bytes, notes."""
    bytes: int = 0
    """Size of inputs and results."""

    @property
    def ended(self) -> bool:
        """Whether the job has reached its final state."""
        return self.state in ENDED


PRIORITY_S = 600.0
"""Seconds by which one step of priority moves a job forward."""


def new_id(kind: Kind) -> str:
    """Return an id that cannot be guessed."""
    return f"{kind}_{secrets.token_hex(16)}"


def is_id(name: str) -> bool:
    """Return whether a text has the form of an id from `new_id`."""
    return re.fullmatch(r"(image|video|generation|text)_[0-9a-f]{32}", name) is not None


def due_time(accepted_at: float, cost: float, priority: int) -> float:
    """Return the place of a job in the queue: the lowest goes first, and it never changes.

    Of jobs that arrive together the short one goes first; a long one is overtaken only by jobs that arrive within its
    own cost after it, so that no job waits forever.
    """
    return accepted_at + cost - priority * PRIORITY_S
