"""Builds requests for the ranks from stored jobs. Input images are decoded in another thread: large ones take
long."""

from __future__ import annotations

import threading
from collections.abc import Callable

from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.request import Request
from shardit.engine.process.loop import Loop
from shardit.server.jobs.job import Job
from shardit.server.jobs.job_request import build_request
from shardit.server.jobs.store import Store


class Prefetcher:
    """Builds the request of the next job. `then()` is called, in the loop, when one with images has been built: one
    at a time, and the newest is kept until its job begins."""

    def __init__(self, store: Store, loop: Loop, then: Callable[[], None]):
        self._store, self._loop, self._then = store, loop, then
        self._building = False
        self._built: tuple[str, Request | Exception] | None = None

    def ready(self, job: Job, info: ModelInfo) -> bool:
        """Return whether `take` can be called. If not, the images are being decoded."""
        if not job.inputs or (self._built is not None and self._built[0] == job.id):
            return True
        if not self._building:
            self._building = True
            threading.Thread(target=self._work, args=(job, info), daemon=True).start()
        return False

    def take(self, job: Job, info: ModelInfo) -> Request:
        """Return the request of a job that is ready. Raises its error: it was accepted for another model, or its files
        are gone."""
        if not job.inputs:
            return build_request(job.request, job.seed, [], info)
        assert self._built is not None, job.id
        built, self._built = self._built[1], None
        if isinstance(built, Exception):
            raise built
        return built

    def forget(self) -> None:
        """Release decoded images that are no longer needed."""
        self._built = None

    def _work(self, job: Job, info: ModelInfo) -> None:
        images = [self._store.files_of(job.id) / name for name in job.inputs]
        built: Request | Exception
        try:
            built = build_request(job.request, job.seed, images, info)
        except Exception as error:
            built = error
        self._loop.call(self._note, job.id, built)

    def _note(self, job_id: str, built: Request | Exception) -> None:
        self._building, self._built = False, (job_id, built)
        self._then()
