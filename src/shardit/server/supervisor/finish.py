"""Finishes jobs: writes result files, records the final state, retries while the disk is full."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

from shardit.diffusion.output.output import Output
from shardit.engine.process.loop import Loop
from shardit.errors import InputError, NothingToSaveError
from shardit.server.jobs.job import Job, State
from shardit.server.jobs.store import Store
from shardit.server.messages import Changed
from shardit.server.supervisor.result_files import write_results

MAX_DEATHS_ALONE = 3
"""Number of deaths of ranks while a job runs alone, after which the job fails."""
LOG_INTERVAL_S = 10.0


class JobFinisher:
    """Handles a job after the ranks have finished it, in the loop. notify: sends a message to the API process."""

    def __init__(
        self, store: Store, loop: Loop, writers: Executor, notify: Callable[[Any], None], log: Any, metrics: Any
    ):
        self._store, self._loop, self._writers = store, loop, writers
        self._notify, self._log, self._metrics = notify, log, metrics
        self.writing: dict[str, Future[Any]] = {}
        """By job id: results being written."""
        self._unwritten: list[Callable[[], None]] = []
        self._logged_at = -LOG_INTERVAL_S

    @property
    def all_written(self) -> bool:
        """Whether all outcomes are in the store."""
        return not self._unwritten

    def write(self, job: Job, output: Output, peaks: dict[int, int], then: Callable[[], None]) -> None:
        """Write the results of a completed job in another thread; call `then` when the job has ended."""
        future = self._writers.submit(write_results, output, self._store.files_of(job.id), job.view)
        self.writing[job.id] = future
        future.add_done_callback(lambda done: self._loop.call(self._written, job, peaks, then, done))

    def _written(self, job: Job, peaks: dict[int, int], then: Callable[[], None], done: Future[Any]) -> None:
        self.writing.pop(job.id, None)
        error = done.exception()
        if isinstance(error, InputError):
            code = "generation_failed" if isinstance(error, NothingToSaveError) else "storage"
            self.end(job, "failed", error=failure(code, str(error)))
        elif error is not None:
            self.end(job, "failed", error=failure("storage", f"{type(error).__name__}: {error}"))
        else:
            files, details = done.result()
            self.end(job, "completed", files=files, details={**details, "peak_bytes": peaks})
        then()

    def end(self, job: Job, state: State, **more: Any) -> None:
        """Set the final state of a job; `more`: arguments of `Store.finish`. A job with a requested cancellation
        becomes cancelled."""

        def write() -> None:
            now = self._store.get(job.id)
            cancelled = now is None or now.cancel_requested
            end: State = "cancelled" if cancelled else state
            values: dict[str, Any] = {} if cancelled else more
            try:
                ended = self._store.finish(job.id, end, durable=job.kind != "text", **values)
            except FileNotFoundError as error:  # the results were removed meanwhile
                end, values = "failed", {"error": failure("storage", str(error))}
                ended = self._store.finish(job.id, end, **values)
            self._notify(Changed(job.id))
            if end != "completed":
                for name in more.get("files", ()):
                    (self._store.files_of(job.id) / name).unlink(missing_ok=True)
            if ended:
                self._metrics.ended(job, end)
                error = {name: value for name, value in values.items() if name == "error"}
                self._log.info("job_ended", request_id=job.id, state=end, **error)

        self.safely(write)

    def requeue(self, job: Job, *, died: bool = False, alone: bool = False) -> None:
        """Queue a job again, see `Store.requeue`; one that is to be cancelled ends."""

        def back() -> None:
            if self._store.requeue(job.id, died=died, alone=alone):
                self._notify(Changed(job.id))
            else:
                self.end(job, "cancelled")

        self.safely(back)

    def retry_or_fail(self, job: Job, reason: str, *, died: bool, alone: bool) -> None:
        """Queue a job again after the loss of its ranks, unless they have died too often while it ran alone."""
        if died and alone and job.deaths_alone + 1 >= MAX_DEATHS_ALONE:
            last = reason.splitlines()[0]
            text = f"the ranks died {MAX_DEATHS_ALONE} times while this job ran alone; the last time: {last}"
            self.end(job, "failed", error=failure("ranks_died", text))
        else:
            self.requeue(job, died=died, alone=alone)

    def retry_writes(self) -> None:
        """Retry failed writes."""
        tasks, self._unwritten = self._unwritten, []
        for task in tasks:
            self.safely(task)

    def safely(self, write: Callable[[], None]) -> None:
        """Run a write to the store, now or when the store can be used again."""
        done = False
        with self.tolerant():
            write()
            done = True
        if not done:
            self._unwritten.append(write)

    @contextlib.contextmanager
    def tolerant(self) -> Iterator[None]:
        """Tolerate errors of the store (disk full): writes are retried at the next tick."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if time.monotonic() - self._logged_at >= LOG_INTERVAL_S:
                self._logged_at = time.monotonic()
                self._log.error("store_failed", error=str(error))


def failure(code: str, message: str) -> dict[str, str]:
    """Return the stored error of a failed job, in one line."""
    return {"code": code, "message": " ".join(message.split())}
