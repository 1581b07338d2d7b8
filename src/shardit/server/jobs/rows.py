"""Converts jobs to rows of the store's table, and back."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from shardit.server.jobs.job import Job, NewJob, due_time


def row_of(job_id: str, new: NewJob, now: float) -> dict[str, Any]:
    """Return the columns of a job that is accepted now."""
    return {
        "id": job_id,
        "kind": new.kind,
        "state": "queued",
        "request": json.dumps(new.request),
        "seed": new.seed,
        "view": json.dumps(new.view),
        "created_at": now,
        "due": due_time(now, new.cost, new.priority),
        "owner": new.owner,
        "waits": int(new.waits),
        "inputs": json.dumps(list(new.inputs)),
        "idempotency_key": new.idempotency_key,
        "fingerprint": new.fingerprint,
        "bytes": sum(map(len, new.inputs.values())),
    }


def job_of(row: sqlite3.Row) -> Job:
    """Return the job of a row."""
    return Job(
        number=row["number"],
        id=row["id"],
        kind=row["kind"],
        state=row["state"],
        request=json.loads(row["request"]),
        seed=row["seed"],
        view=json.loads(row["view"]),
        created_at=row["created_at"],
        due=row["due"],
        owner=row["owner"],
        waits=bool(row["waits"]),
        inputs=tuple(json.loads(row["inputs"])),
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        attempts=row["attempts"],
        deaths=row["deaths"],
        deaths_alone=row["deaths_alone"],
        cancel_requested=bool(row["cancel_requested"]),
        error=None if row["error"] is None else json.loads(row["error"]),
        files=tuple(json.loads(row["files"])),
        details=json.loads(row["facts"]),
        bytes=row["bytes"],
    )
