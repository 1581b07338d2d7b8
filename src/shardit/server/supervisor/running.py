"""The supervisor's state of a running job."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardit.diffusion.request.request import Request
from shardit.engine.process.in_flight import InFlight
from shardit.language.request.rows import PromptGroup
from shardit.server.estimate import Work
from shardit.server.jobs.job import Job

Size = tuple[Any, ...]


def size_of(request: Request | PromptGroup) -> Size:
    """Return the key for the time of a step: requests of equal size are expected to behave alike."""
    if isinstance(request, PromptGroup):  # of numbers, their order of magnitude
        return ("text", max(len(row.prompt) for row in request.rows).bit_length(), len(request.rows).bit_length())
    names = ("height", "width", "num_frames", "resolution", "layers")
    sides = [request.kwargs.get(name) for name in names]
    # Without a size of its own the result takes that of the image.
    images = len(request.images) if sides[0] and sides[1] else tuple(image.size for image in request.images)
    return (request.pipeline, *sides, request.num_outputs, images)


def in_flight(running: Mapping[int, RunningJob], replica: int) -> list[RunningJob]:
    """Return the jobs that have a slot of a replica."""
    return [one for one in running.values() if one.replica == replica and not one.ahead]


@dataclass
class RunningJob:
    """A job in flight on one replica. Times are those of the monotonic clock, in seconds."""

    job: Job
    request: Request | PromptGroup
    on_ranks: InFlight
    jobs_at_start: int
    """Jobs in flight on the replica when it began, itself included."""
    work: Work
    begun: float = field(default_factory=time.monotonic)
    step: int = 0
    total: int = 0
    first_step: float | None = None
    """Time of the start of denoising."""
    last_step: float | None = None
    """Time at which the newest step was done."""
    denoised: float | None = None
    """Time at which the last step was done."""
    cancelling: bool = False
    used_up_memory: bool = False
    """Whether a rank ran out of memory in it."""
    ahead: bool = False
    """Whether the ranks have it, but not yet a free slot for it."""

    @property
    def replica(self) -> int:
        """The replica that runs it."""
        return self.on_ranks.replica

    @property
    def size(self) -> Size:
        """See `size_of`."""
        return size_of(self.request)

    def progress(self, step: int, total: int) -> float | None:
        """Record a step; returns the seconds since the one before, None for the first."""
        now = time.monotonic()
        before, self.last_step = self.last_step, now
        self.step, self.total = step, total
        if self.first_step is None:
            self.first_step = now
        if step >= total:
            self.denoised = now
        return now - before if before is not None and step > 0 else None

    @property
    def leaving(self) -> bool:
        """Whether its last step is done, so that its slot will be free soon."""
        return self.denoised is not None

    def enters(self) -> None:
        """Record that it has a slot."""
        self.ahead = False
        if self.first_step is None:  # a rank that is ahead of the others may have reported it before
            self.begun = time.monotonic()

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the steps so far."""
        if self.first_step is None or self.last_step is None or not self.step:
            return None
        return (self.last_step - self.first_step) / self.step
