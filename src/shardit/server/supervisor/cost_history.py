"""Costs learned from running jobs, kept in the store for the API process and the next start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardit.diffusion.request.model_info import ModelInfo
from shardit.language.info import LanguageInfo
from shardit.server import estimate
from shardit.server.estimate import MemorySample, Work
from shardit.server.jobs.store import Store
from shardit.server.options import ServeOptions

_OF = "learned_of"
_SHARE = 0.9
"""Usable share of the memory: the rest is for unmeasured use."""


class CostHistory:
    """Speed and memory of one model on one layout. A change of layout clears it."""

    def __init__(self, store: Store, options: ServeOptions):
        self._store = store
        of = repr((options.model, options.config, options.dtype, options.device, options.loading))
        if store.recall(_OF) != of:
            for name in (estimate.SPEED, estimate.MEMORY):
                store.remember(name, None)
            store.remember(_OF, of)
        self._speed: float | None = store.recall(estimate.SPEED)
        memory = store.recall(estimate.MEMORY)
        self._memory: dict[str, Any] | None = estimate.reset_failures(memory)
        self._saved = (self._speed, memory)

    def record_idle_memory(self, infos: Sequence[ModelInfo | LanguageInfo]) -> None:
        """Record the memory of loaded ranks at rest. The fullest counts."""
        tightest = max(infos, key=lambda one: one.held_bytes / one.limit_bytes if one.limit_bytes else 0.0)
        self._record_sample(MemorySample(0, tightest.held_bytes, tightest.limit_bytes))

    def completed(self, work: Work, seconds: float, together: int, peak_bytes: int) -> None:
        """Record the seconds of a job, and the peak memory of the fullest rank while `together` pixels were in
        flight."""
        self._speed = estimate.learn_speed(self._speed, work, seconds)
        self._record_sample(MemorySample(together, peak_bytes))

    def out_of_memory(self, together: int) -> None:
        """Record that so many pixels in flight ran out of memory."""
        self._record_sample(MemorySample(together, 0, out_of_memory=True))

    def fits(self, together: int) -> bool:
        """Return whether so many pixels may be in flight at once."""
        known = self._memory or {}
        failed, limit = known.get("failed"), known.get("limit")
        if failed and together >= failed:
            return False
        return not limit or estimate.expected_peak(together, known) <= _SHARE * limit

    def save(self) -> None:
        """Store new values."""
        now = (self._speed, self._memory)
        if now != self._saved:
            self._store.remember(estimate.SPEED, self._speed)
            self._store.remember(estimate.MEMORY, self._memory)
            self._saved = now

    def _record_sample(self, seen: MemorySample) -> None:
        self._memory = estimate.learn_memory(self._memory, seen)
