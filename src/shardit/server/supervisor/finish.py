"""How jobs end: results become files, ends are written down, and both are tried again where the disk refuses."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

from shardit.diffusion.output.output import Output
from shardit.engine.process.loop import Loop
from shardit.errors import InputError
from shardit.server.jobs.job import Job, State
from shardit.server.jobs.store import Store
from shardit.server.messages import Changed
from shardit.server.supervisor.result_files import write_results

MAX_DEATHS_ALONE = 3
"""How often ranks may die while a job runs alone."""
SAY_AGAIN_S = 10.0


class JobFinisher:
    """Everything that happens to a job after the ranks, in the loop. tell(message) reaches the API process."""

    def __init__(
        self, store: Store, loop: Loop, writers: Executor, tell: Callable[[Any], None], log: Any, metrics: Any
    ):
        self._store, self._loop, self._writers = store, loop, writers
        self._tell, self._log, self._metrics = tell, log, metrics
        self.writing: dict[str, Future[Any]] = {}
        """By job, results on their way to the disk."""
        self._unwritten: list[Callable[[], None]] = []
        self._said_at = -SAY_AGAIN_S

    @property
    def all_written(self) -> bool:
        """Whether the store knows all that has happened."""
        return not self._unwritten

    def write(self, job: Job, output: Output, peaks: dict[int, int], then: Callable[[], None]) -> None:
        """Write the results of a job that the ranks have completed, beside the loop; `then` it has ended."""
        future = self._writers.submit(write_results, output, self._store.files_of(job.id), job.view)
        self.writing[job.id] = future
        future.add_done_callback(lambda done: self._loop.call(self._written, job, peaks, then, done))

    def _written(self, job: Job, peaks: dict[int, int], then: Callable[[], None], done: Future[Any]) -> None:
        self.writing.pop(job.id, None)
        error = done.exception()
        if isinstance(error, InputError):
            self.end(job, "failed", error=failure("storage", str(error)))
        elif error is not None:
            self.end(job, "failed", error=failure("storage", f"{type(error).__name__}: {error}"))
        else:
            files, facts = done.result()
            self.end(job, "completed", files=files, facts={**facts, "peak_bytes": peaks})
        then()

    def end(self, job: Job, state: State, **more: Any) -> None:
        """The end of a job, with what `Store.finish` takes. One that is to be cancelled has been cancelled."""

        def write() -> None:
            now = self._store.get(job.id)
            cancelled = now is None or now.cancel_requested
            end: State = "cancelled" if cancelled else state
            facts: dict[str, Any] = {} if cancelled else more
            try:
                ended = self._store.finish(job.id, end, **facts)
            except FileNotFoundError as error:  # somebody has removed the results
                end, facts = "failed", {"error": failure("storage", str(error))}
                ended = self._store.finish(job.id, end, **facts)
            self._tell(Changed(job.id))
            if end != "completed":
                for name in more.get("files", ()):
                    (self._store.files_of(job.id) / name).unlink(missing_ok=True)
            if ended:
                self._metrics.ended(job, end)
                error = {name: value for name, value in facts.items() if name == "error"}
                self._log.info("job_ended", request_id=job.id, state=end, **error)

        self.safely(write)

    def put_back(self, job: Job, *, died: bool = False, alone: bool = False) -> None:
        """Queue a job again, see `Store.put_back`; one that is to be cancelled ends."""

        def back() -> None:
            if self._store.put_back(job.id, died=died, alone=alone):
                self._tell(Changed(job.id))
            else:
                self.end(job, "cancelled")

        self.safely(back)

    def again_or_never(self, job: Job, reason: str, *, died: bool, alone: bool) -> None:
        """Queue a job again whose ranks are gone, unless they have died too often while it ran alone."""
        if died and alone and job.deaths_alone + 1 >= MAX_DEATHS_ALONE:
            last = reason.splitlines()[0]
            text = f"the ranks died {MAX_DEATHS_ALONE} times while this job ran alone; the last time: {last}"
            self.end(job, "failed", error=failure("ranks_died", text))
        else:
            self.put_back(job, died=died, alone=alone)

    def write_again(self) -> None:
        """Write down what could not be written before."""
        tasks, self._unwritten = self._unwritten, []
        for task in tasks:
            self.safely(task)

    def safely(self, write: Callable[[], None]) -> None:
        """Do something with the store, now or when the store can be used again."""
        done = False
        with self.tolerant():
            write()
            done = True
        if not done:
            self._unwritten.append(write)

    @contextlib.contextmanager
    def tolerant(self) -> Iterator[None]:
        """The store may refuse something for a while (disk full): all is tried again at the next tick."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if time.monotonic() - self._said_at >= SAY_AGAIN_S:
                self._said_at = time.monotonic()
                self._log.error("store_failed", error=str(error))


def failure(code: str, message: str) -> dict[str, str]:
    """Why a job has failed, as it is stored: one line."""
    return {"code": code, "message": " ".join(message.split())}
