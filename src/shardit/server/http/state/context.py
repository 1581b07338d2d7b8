"""Shared objects of the routes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from shardit.server.http.schema.fields import FieldModels
from shardit.server.http.state.live_state import LiveState
from shardit.server.http.state.metrics import HttpMetrics
from shardit.server.jobs.store import Store
from shardit.server.options import ServeOptions


@dataclass(frozen=True)
class Context:
    """One app's objects. The store may wait for the disk and for the supervisor, so it is used in threads only."""

    options: ServeOptions
    store: Store
    live_state: LiveState
    fields: FieldModels
    metrics: HttpMetrics
    started_at: float = field(default_factory=time.time)
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """Uploads are decoded one after the other: a picture takes a hundred times the memory of its file."""
    fetching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))
    """Limits fetches of pictures from other hosts, so that they leave threads to other requests."""
