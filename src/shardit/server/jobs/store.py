"""The store of jobs: SQLite for their state, a folder for each with its input and result files.

Both the API process and the supervisor open it. Every change is one transaction, so that a process may be killed
between any two lines; a job ends by a single UPDATE that only matches an open job.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shardit.errors import InputError
from shardit.server.jobs import admission
from shardit.server.jobs.admission import check_inputs, insert, known_or_room, write_inputs
from shardit.server.jobs.database import Database
from shardit.server.jobs.job import ENDED, Job, Kind, NewJob, State, is_id, new_id
from shardit.server.jobs.rows import job_of
from shardit.server.options import DATABASE

CANCELLED_WAITING = "cancelled_waiting"
"""Name for `recall`: the number of jobs ever cancelled before a rank had them."""


class Store:
    """The jobs in `folder`. Safe to use from several threads and processes.

    Raises InputError if the folder cannot be used. clock: returns seconds since 1970.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time):
        self.folder = folder
        self._clock = clock
        try:
            (folder / "jobs").mkdir(parents=True, exist_ok=True)
            if not os.access(folder / "jobs", os.W_OK | os.X_OK):  # every job would fail when its files are written
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / "jobs"))
            self._db = Database(folder / DATABASE)
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"the data folder {folder} cannot be used ({error}); choose another with --data-dir"
            ) from error

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def files_of(self, job_id: str) -> Path:
        """Return the folder of a job's files; `job_id` must come from the store."""
        return self.folder / "jobs" / job_id

    # Changes of a job's state.

    def accept(self, new: NewJob, *, queue_size: int, of_owner: int | None = None) -> tuple[Job, bool]:
        """Store a job as queued, its input files first; returns it, and whether it is new.

        A repeated idempotency key with the same fingerprint returns its job; with another fingerprint it raises
        Conflict. Raises QueueFull if `queue_size` jobs are queued, or the owner has `of_owner` open ones.
        """
        if (known := known_or_room(self._db, new, queue_size, of_owner)) is not None:
            return known, False
        job_id = new.id or new_id(new.kind)
        try:
            write_inputs(self.files_of(job_id), new)  # which may take a while, in which others can write
            with self._db.transaction(durable=not new.waits):  # if its client waits, the connection is lost as well
                if (known := known_or_room(self._db, new, queue_size, of_owner)) is None:
                    check_inputs(self.files_of(job_id), new)
                    insert(self._db, job_id, new, self._clock())
                job = known or self.get(job_id)
        except BaseException:
            shutil.rmtree(self.files_of(job_id), ignore_errors=True)
            raise
        if known is not None:
            shutil.rmtree(self.files_of(job_id), ignore_errors=True)
        assert job is not None
        return job, known is None

    def knows(self, new: NewJob) -> bool:
        """Return whether `accept` would return an existing job. Raises Conflict."""
        return admission.known(self._db, new) is not None

    def start(self, job_id: str) -> bool:
        """queued -> in_progress. A power failure may lose this change: the job is then queued, as it would be anyway.
        Returns False if another process was first, or the job is cancelled."""
        sql = "UPDATE jobs SET state='in_progress', started_at=?, attempts=attempts+1 WHERE id=? AND state='queued'"
        return bool(self._db.change(sql, self._clock(), job_id, durable=False))

    def requeue(self, job_id: str, *, died: bool = False, alone: bool = False) -> bool:
        """in_progress -> queued, at its old place: its ranks are gone, or it has to make way. died: count a death of
        ranks during the job. alone: no other job ran at that time. Returns False if it is to be cancelled."""
        sql = (
            "UPDATE jobs SET state='queued', started_at=NULL, deaths=deaths+?, deaths_alone=deaths_alone+?"
            " WHERE id=? AND state='in_progress' AND cancel_requested=0"
        )
        return bool(self._db.change(sql, int(died), int(died and alone), job_id))

    def finish(
        self,
        job_id: str,
        state: State,
        *,
        error: dict[str, Any] | None = None,
        files: Sequence[str] = (),
        details: dict[str, Any] | None = None,
        durable: bool = True,
    ) -> bool:
        """Set the final state of a job; returns False if it has ended already. Its files must be in their folder by
        now. durable: as of `Database.transaction`."""
        assert state in ENDED, state
        size = sum((self.files_of(job_id) / name).stat().st_size for name in files)
        with self._db.transaction(durable):
            done = self._db.change(
                "UPDATE jobs SET state=?, finished_at=MAX(?, created_at), error=?, files=?, facts=?, bytes=bytes+?"
                " WHERE id=? AND state IN ('queued', 'in_progress')",
                state,
                self._clock(),
                None if error is None else json.dumps(error),
                json.dumps(list(files)),
                json.dumps(details or {}),
                size,
                job_id,
            )
            doomed = self._db.one("SELECT 1 FROM jobs WHERE id=? AND doomed=1", job_id)
        if doomed:
            self._remove([job_id])
        return bool(done)

    def request_cancel(self, job_id: str) -> Job | None:
        """Cancel a queued job at once, and one in progress when the ranks receive the request; finished jobs stay as
        they are. Returns the present job, None if there is none."""
        with self._db.transaction():
            ended = self._db.change(
                "UPDATE jobs SET state='cancelled', cancel_requested=1, finished_at=? WHERE id=? AND state='queued'",
                self._clock(),
                job_id,
            )
            self._count(CANCELLED_WAITING, ended)
            self._db.change("UPDATE jobs SET cancel_requested=1 WHERE id=? AND state='in_progress'", job_id)
            return self.get(job_id)

    def delete(self, job_id: str) -> bool:
        """Delete a job and its files; one that is open is cancelled first. Returns False if there is none."""
        with self._db.transaction():
            if (job := self.request_cancel(job_id)) is None:
                return False
            self._db.change("UPDATE jobs SET doomed=1, idempotency_key=NULL WHERE id=?", job_id)
        if job.ended:
            self._remove([job_id])
        return True

    def drop_waiting(self) -> list[str]:
        """Cancel the jobs whose clients waited on a connection of an earlier API process. Texts are deleted, since
        nobody can ask for them again."""
        rows = self._db.all("SELECT id FROM jobs WHERE waits=1 AND kind<>'text' AND state IN ('queued', 'in_progress')")
        gone = [row["id"] for row in rows if self.request_cancel(row["id"])]
        open_texts = [row["id"] for row in self._db.all("SELECT id FROM jobs WHERE kind='text' AND doomed=0")]
        return gone + [job_id for job_id in open_texts if self.delete(job_id)]

    def recover(self) -> list[Job]:
        """After a start: queue jobs in progress again, or cancel them if that was requested. Returns the queued ones.

        Removes folders of unknown jobs, and nothing else.
        """
        with self._db.transaction():
            ended = self._db.change(
                "UPDATE jobs SET state='cancelled', finished_at=? WHERE state='in_progress' AND cancel_requested=1",
                self._clock(),
            )
            self._count(CANCELLED_WAITING, ended)
            again = self._db.all("SELECT * FROM jobs WHERE state='in_progress'")
            # One of them may have killed the whole server: after another death each of them runs alone.
            self._db.change(
                "UPDATE jobs SET state='queued', started_at=NULL, deaths=deaths+1 WHERE state='in_progress'"
            )
        # No process runs these any more: doomed jobs are those with a requested cancellation.
        self._remove([row["id"] for row in self._db.all("SELECT id FROM jobs WHERE doomed=1")])
        with self._db.transaction():  # a remaining process of a killed server may be in the middle of `accept`
            known = {row["id"] for row in self._db.all("SELECT id FROM jobs")}
            for path in (self.folder / "jobs").iterdir():
                if is_id(path.name) and path.name not in known:
                    shutil.rmtree(path, ignore_errors=True)
        return [job_of(row) for row in again]

    def retain(self, max_age_s: float, max_bytes: int, at_most: int | None = None) -> list[str]:
        """Delete ended jobs that are older than `max_age_s`, and the oldest until all files fit `max_bytes`; no more
        than `at_most` of them now. Returns their ids."""
        ended = self._db.all(
            "SELECT id, finished_at, bytes FROM jobs WHERE state NOT IN ('queued', 'in_progress') ORDER BY number"
        )
        row = self._db.one("SELECT COALESCE(SUM(bytes), 0) FROM jobs")
        assert row is not None
        total, gone, now = row[0], [], self._clock()
        for job in ended:
            if now - (job["finished_at"] or now) > max_age_s or total > max_bytes:
                gone.append(job["id"])
                total -= job["bytes"]
        self._remove(gone[:at_most])
        return gone[:at_most]

    # Queries.

    def get(self, job_id: str) -> Job | None:
        """Return the present job; None if there is none, or it is to be deleted."""
        row = self._db.one("SELECT * FROM jobs WHERE id=? AND doomed=0", job_id)
        return None if row is None else job_of(row)

    def queued(self, limit: int = 100) -> list[Job]:
        """Return the next jobs, in the order in which they are to begin."""
        rows = self._db.all("SELECT * FROM jobs WHERE state='queued' ORDER BY due, number LIMIT ?", limit)
        return [job_of(row) for row in rows]

    def in_progress(self) -> list[Job]:
        """Return the jobs that have begun and not ended."""
        return [job_of(row) for row in self._db.all("SELECT * FROM jobs WHERE state='in_progress'")]

    def to_cancel(self) -> list[str]:
        """Return the jobs in progress with a requested cancellation."""
        rows = self._db.all("SELECT id FROM jobs WHERE state='in_progress' AND cancel_requested=1")
        return [row["id"] for row in rows]

    def position(self, job: Job) -> int:
        """Return the number of queued jobs before this one."""
        row = self._db.one(
            "SELECT COUNT(*) FROM jobs WHERE state='queued' AND (due, number) < (?, ?)", job.due, job.number
        )
        assert row is not None
        return row[0]

    def page(
        self, kind: Kind, *, owner: str | None, after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> tuple[list[Job], bool]:
        """Return jobs of one kind and owner by the order of acceptance, starting after `after`; and whether there are
        more. Raises InputError if `after` is none of them."""
        newest = order == "desc"
        where, values = "kind=? AND doomed=0 AND owner IS ?", [kind, owner]
        if after is not None:
            row = self._db.one(f"SELECT number FROM jobs WHERE id=? AND {where}", after, *values)
            if row is None:
                raise InputError(f"after: there is no job {after!r}")
            where, values = f"{where} AND number {'<' if newest else '>'} ?", [*values, row["number"]]
        sql = f"SELECT * FROM jobs WHERE {where} ORDER BY number {'DESC' if newest else 'ASC'} LIMIT ?"
        rows = self._db.all(sql, *values, limit + 1)
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    def to_repeat(self) -> int:
        """Return the number of open jobs that have begun before: a start runs them again."""
        return self._to_run("attempts > 0")

    def to_run(self) -> int:
        """Return the number of open jobs that a start continues: those that it drops or cancels are left out."""
        return self._to_run("TRUE")

    def without_owner(self) -> int:
        """Return the number of open jobs that a start continues and that were sent without a key."""
        return self._to_run("owner IS NULL")

    def _to_run(self, which: str) -> int:
        continued = "state IN ('queued', 'in_progress') AND waits=0 AND kind<>'text' AND cancel_requested=0"
        row = self._db.one(f"SELECT COUNT(*) FROM jobs WHERE {continued} AND {which}")
        assert row is not None
        return row[0]

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by state."""
        return {row["state"]: row["n"] for row in self._db.all("SELECT state, COUNT(*) AS n FROM jobs GROUP BY state")}

    # Values that outlive a process, such as the time of a step.

    def remember(self, name: str, value: Any) -> None:
        """Store a JSON value under a name."""
        self._db.change("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", name, json.dumps(value))

    def recall(self, name: str, default: Any = None) -> Any:
        """Return the value stored under a name."""
        row = self._db.one("SELECT value FROM facts WHERE name=?", name)
        return default if row is None else json.loads(row["value"])

    def _count(self, name: str, more: int) -> None:
        if more:
            self._db.change(
                "INSERT INTO facts (name, value) VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET value=CAST(value AS INTEGER)+excluded.value",
                name,
                more,
            )

    def _remove(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            self._db.change("DELETE FROM jobs WHERE id=?", job_id)
            shutil.rmtree(self.files_of(job_id), ignore_errors=True)
