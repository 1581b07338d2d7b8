"""Sends a job's progress as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from shardit.server.http.answers.waiting import POLL_INTERVAL_S
from shardit.server.http.schema.job_errors import job_error
from shardit.server.http.schema.jobs import percent, progress_of
from shardit.server.http.state.context import Context
from shardit.server.jobs.job import Job

KEEPALIVE_INTERVAL_S = 10.0

DESCRIPTION = """Server-sent events until the job has ended: `queued` {"position"} whenever its place changes,
`step` {"phase", "step", "steps", "seconds_per_step", "seconds_left", "progress"} after each step,
and at last `finished` {"status", "error"}. A comment line comes every ten seconds."""


async def events(context: Context, job: Job) -> AsyncIterator[bytes]:
    """Yield the events of a job from now on."""
    last: tuple[str, Any] | None = None
    sent_at = time.monotonic()
    with context.live_state.watching(job.id, steps=True) as watch:
        while True:
            found = await run_in_threadpool(context.store.get, job.id)
            event = await _event(context, found)
            if event is not None and event != last:
                last, sent_at = event, time.monotonic()
                yield f"event: {event[0]}\ndata: {json.dumps(event[1])}\n\n".encode()
            if found is None or found.ended or context.live_state.stopping:
                return
            if time.monotonic() - sent_at >= KEEPALIVE_INTERVAL_S:
                sent_at = time.monotonic()
                yield b": still here\n\n"
            await watch.wait(POLL_INTERVAL_S)


async def _event(context: Context, job: Job | None) -> tuple[str, dict[str, Any]] | None:
    if job is None:
        return "finished", {"status": "deleted", "error": None}
    if job.ended:
        error = job_error(job)
        return "finished", {"status": job.state, "error": None if error is None else error.model_dump()}
    if job.state == "queued":
        return "queued", {"position": await run_in_threadpool(context.store.position, job)}
    step = context.live_state.step(job.id)
    return None if step is None else ("step", {**progress_of(step), "progress": percent(step)})
