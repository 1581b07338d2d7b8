"""Waits for the end of a job while its client waits on the connection."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from shardit.server.http.schema.errors import ApiError, busy
from shardit.server.http.schema.job_errors import is_clients_fault, job_error
from shardit.server.http.state.context import Context
from shardit.server.jobs.job import Job

POLL_INTERVAL_S = 1.0
"""Longest time between two looks into the store, in seconds: notifications may be lost, jobs may not."""


async def until_ended(request: Request, context: Context, job: Job) -> Job:
    """Return the job after its end. If the client disconnects before, the job is cancelled unless another client can
    ask for it.

    Raises ApiError if the server stops or the job is deleted; asyncio.CancelledError if the process exits.
    """
    gone = asyncio.ensure_future(client_gone(request))
    try:
        with context.live_state.watching(job.id, steps=False) as watch:
            while not job.ended:
                if context.live_state.stopping:
                    raise busy("the server is about to end; send the request again later", 5, "stopping")
                if gone.done():
                    raise ClientGone
                change = asyncio.ensure_future(watch.wait(POLL_INTERVAL_S))
                await asyncio.wait({change, gone}, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                found = await run_in_threadpool(context.store.get, job.id)
                if found is None:
                    raise ApiError(404, f"the job {job.id} was deleted", code="not_found")
                job = found
        return job
    except (ClientGone, asyncio.CancelledError):
        if job.waits:
            await asyncio.shield(run_in_threadpool(context.store.request_cancel, job.id))
            context.live_state.mark_changed(job.id)
        raise
    finally:
        gone.cancel()


class ClientGone(Exception):
    """The client has disconnected and needs no answer."""


async def client_gone(request: Request) -> None:
    """Return when the client has disconnected; to be called when its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_completed(job: Job) -> None:
    """Raise ApiError if the job ended without a result."""
    if job.state == "cancelled":
        raise ApiError(409, f"the job {job.id} was cancelled", code="cancelled")
    if error := job_error(job):
        status = 400 if is_clients_fault(error.code) else 500
        raise ApiError(status, f"the job {job.id} failed: {error.message}", code=error.code, param=error.param)
