"""Shared objects of the routes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardit.server.http.schema.fields import FieldModels
from shardit.server.http.state.live_state import LiveState
from shardit.server.http.state.metrics import HttpMetrics
from shardit.server.jobs.store import Store
from shardit.server.options import ServeOptions

if TYPE_CHECKING:
    from shardit.server.http.texts.fields import TextFields
    from shardit.server.http.texts.text_model import TextModel


@dataclass(frozen=True)
class Context:
    """One app's objects. The store may wait for the disk and for the supervisor, so it is used in threads only."""

    options: ServeOptions
    store: Store
    live_state: LiveState
    fields: FieldModels
    metrics: HttpMetrics
    text_fields: TextFields
    texts: TextModel | None = None
    """Of a server of a language model."""
    started_at: float = field(default_factory=time.time)
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """Uploads are decoded one after the other: an image takes a hundred times the memory of its file."""
    fetching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))
    """Limits fetches of images from other hosts, so that they leave threads to other requests."""
