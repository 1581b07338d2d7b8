"""Routes for jobs of every kind: get, list, follow, cancel and delete."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from shardit.errors import InputError
from shardit.server.http.answers.events import DESCRIPTION, events
from shardit.server.http.schema.errors import ApiError, answers
from shardit.server.http.schema.jobs import Deleted, GenerationJob, ImageJob, VideoJob, view
from shardit.server.http.schema.openapi import EventStream
from shardit.server.http.state.context import Context
from shardit.server.http.submit.submit import owner
from shardit.server.jobs.job import Job, Kind

_ID = re.compile(r"(image|video|generation)_[0-9a-f]{32}")


def base_url(request: Request) -> str:
    """Return the address of this server for the client."""
    return str(request.base_url).rstrip("/")


def find_job(request: Request, context: Context, kind: Kind, job_id: str) -> Job:
    """Return the job of that kind with that id. Raises ApiError (404) if there is none, or another key owns it."""
    job = context.store.get(job_id) if _ID.fullmatch(job_id) else None
    if job is None or job.kind != kind or job.owner != owner(request):
        raise ApiError(404, f"there is no {kind} {job_id!r}", code="not_found")
    request.scope["state"]["job"] = job.id
    return job


def show(request: Request, context: Context, job: Job) -> ImageJob | VideoJob | GenerationJob:
    """Return the job as its client sees it."""
    return view(
        job,
        model=context.options.name,
        base_url=base_url(request),
        position=context.store.position(job) if job.state == "queued" else None,
        step=context.live_state.step(job.id),
        keep_days=context.options.keep_days,
    )


def add_job_routes(
    router: APIRouter, context: Context, kind: Kind, one: type[BaseModel], page: type[BaseModel]
) -> None:
    """Add the routes that /v1/images and /v1/videos both have. Call it after adding their own routes, which an id would
    hide. one, page: models of the answers."""

    @router.get("", response_model=page, responses=answers(400, 401))
    def list_jobs(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        """A page of jobs, the newest first by default."""
        try:
            jobs, more = context.store.page(kind, owner=owner(request), after=after, limit=limit, order=order)
        except InputError as error:
            raise ApiError(400, str(error), code="invalid_value", param="after") from error
        shown = [show(request, context, job) for job in jobs]
        ids = [job.id for job in shown] or [None]
        return {"data": shown, "first_id": ids[0], "last_id": ids[-1], "has_more": more}

    @router.get("/{job_id}", response_model=one, responses=answers(401, 404))
    def retrieve_job(request: Request, response: Response, job_id: str) -> Any:
        """A job as it is now."""
        job = find_job(request, context, kind, job_id)
        if not job.ended:
            response.headers["openai-poll-after-ms"] = "500"
        return show(request, context, job)

    @router.delete("/{job_id}", response_model=Deleted, responses=answers(401, 403, 404, 503))
    async def delete_job(request: Request, job_id: str) -> Any:
        """Delete a job and its files; if it has not ended, it is cancelled first."""
        job = await run_in_threadpool(find_job, request, context, kind, job_id)
        await run_in_threadpool(context.store.delete, job.id)
        context.live_state.mark_changed(job.id)
        return Deleted.model_validate({"id": job.id, "object": f"{kind}.deleted"})

    @router.post("/{job_id}/cancel", response_model=one, responses=answers(401, 403, 404, 503))
    async def cancel_job(request: Request, job_id: str) -> Any:
        """Cancel a job, within a step if it runs; a finished job stays as it is."""
        job = await run_in_threadpool(find_job, request, context, kind, job_id)
        job = await run_in_threadpool(context.store.request_cancel, job.id) or job
        context.live_state.mark_changed(job.id)
        return await run_in_threadpool(show, request, context, job)

    @router.get("/{job_id}/events", response_class=EventStream, description=DESCRIPTION, responses=answers(401, 404))
    async def job_events(request: Request, job_id: str) -> StreamingResponse:
        job = await run_in_threadpool(find_job, request, context, kind, job_id)
        return StreamingResponse(events(context, job), media_type="text/event-stream")
