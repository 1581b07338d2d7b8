"""Checks for a new job: room in the queue, an unused idempotency key, and input files on the disk."""

from __future__ import annotations

import os
from pathlib import Path

from shardit.server.jobs.database import Database
from shardit.server.jobs.job import Job, NewJob
from shardit.server.jobs.rows import job_of, row_of


class QueueFull(Exception):
    """The queue is full; `retry_after_s`: seconds until the next place is expected."""

    def __init__(self, text: str, retry_after_s: float):
        super().__init__(text)
        self.retry_after_s = retry_after_s


class Conflict(Exception):
    """The idempotency key was used for another request."""


def known(db: Database, new: NewJob) -> Job | None:
    """Return the job that was created with the same idempotency key. Raises Conflict."""
    if new.idempotency_key is None:
        return None
    row = db.one("SELECT * FROM jobs WHERE idempotency_key=? AND owner IS ?", new.idempotency_key, new.owner)
    if row is not None and row["fingerprint"] != new.fingerprint:
        raise Conflict(
            f"the idempotency key {new.idempotency_key!r} was used for another request, or with another model or "
            "other options of the model; use a new one"
        )
    return None if row is None else job_of(row)


def known_or_room(db: Database, new: NewJob, queue_size: int, of_owner: int | None) -> Job | None:
    """Return `known`, or None for a new job if there is room for it; see `Store.accept`, also for the errors."""
    if (job := known(db, new)) is None:
        _check_room(db, new, queue_size, of_owner)
    return job


def insert(db: Database, job_id: str, new: NewJob, now: float) -> None:
    """Put a job into the queue, in a transaction of the caller's."""
    _move_clock(db, now)
    values = row_of(job_id, new, now)
    names = ", ".join(values)
    marks = ", ".join("?" * len(values))
    db.change(f"INSERT INTO jobs ({names}) VALUES ({marks})", *values.values())


def write_inputs(folder: Path, new: NewJob) -> None:
    """Create the folder of a job, with its input files."""
    folder.mkdir()
    for name, data in new.inputs.items():
        with open(folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def check_inputs(folder: Path, new: NewJob) -> None:
    """Raise FileNotFoundError if the folder is missing: a server that has just started removes folders without a job,
    and may have removed this one before its job existed."""
    if not folder.is_dir() or not all((folder / name).is_file() for name in new.inputs):
        raise FileNotFoundError(f"{folder} was removed while the job was accepted; send it again")


def _check_room(db: Database, new: NewJob, queue_size: int, of_owner: int | None) -> None:
    retry_after_s = max(1.0, min(new.cost, 60.0))
    row = db.one("SELECT COUNT(*) FROM jobs WHERE state='queued'")
    assert row is not None
    if row[0] >= queue_size:
        raise QueueFull(f"the queue is full ({queue_size} jobs wait); try again later", retry_after_s)
    if of_owner is not None:
        mine = db.one("SELECT COUNT(*) FROM jobs WHERE owner IS ? AND state IN ('queued', 'in_progress')", new.owner)
        assert mine is not None
        if mine[0] >= of_owner:
            text = f"this key has {of_owner} jobs open, which is its limit; wait for one to end"
            raise QueueFull(text, retry_after_s)


def _move_clock(db: Database, now: float) -> None:
    """If the clock was set back, move open jobs along: they keep their order, and continue to age."""
    is_open = "state IN ('queued', 'in_progress')"
    row = db.one(f"SELECT MAX(created_at) FROM jobs WHERE {is_open}")
    assert row is not None
    if row[0] is not None and row[0] > now:
        back = row[0] - now
        db.change(f"UPDATE jobs SET created_at=created_at-?, due=due-? WHERE {is_open}", back, back)
