"""What can be done with a job of either kind: look at it, cancel it, forget it, follow it, fetch its files."""

from __future__ import annotations

import re

from fastapi import Request

from ...errors import InputError
from ..jobs import Job, Kind
from .accept import owner
from .context import Context
from .errors import ApiError
from .views import Deleted, ImageJob, VideoJob, view

_ID = re.compile(r"(image|video)_[0-9a-f]{32}")


def base_url(request: Request) -> str:
    """Where the client reaches this server."""
    return str(request.base_url).rstrip("/")


def find_job(request: Request, context: Context, kind: Kind, job_id: str) -> Job:
    """The job of that kind with that id. Raises ApiError (404) where there is none, or another key owns it."""
    job = context.store.get(job_id) if _ID.fullmatch(job_id) else None
    if job is None or job.kind != kind or job.owner != owner(request):
        raise ApiError(404, f"there is no {kind} {job_id!r}", code="not_found")
    request.scope["state"]["job"] = job.id
    return job


def show(request: Request, context: Context, job: Job) -> ImageJob | VideoJob:
    """The job as its client sees it."""
    return view(
        job,
        model=context.options.name,
        base_url=base_url(request),
        position=context.store.position(job) if job.state == "queued" else None,
        step=context.board.step(job.id),
        keep_days=context.options.keep_days,
    )


def list_jobs(
    request: Request, context: Context, kind: Kind, after: str | None, limit: int, order: str
) -> dict[str, object]:
    """A page of the client's own jobs."""
    try:
        jobs, more = context.store.page(kind, owner=owner(request), after=after, limit=limit, order=order)
    except InputError as error:
        raise ApiError(400, str(error), code="invalid_value", param="after") from error
    shown = [show(request, context, job) for job in jobs]
    return {
        "data": shown,
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": more,
    }


def cancel_job(request: Request, context: Context, kind: Kind, job_id: str) -> Job:
    """Ask for the end of a job; one that has ended stays as it is."""
    job = find_job(request, context, kind, job_id)
    return context.store.request_cancel(job.id) or job


def delete_job(request: Request, context: Context, kind: Kind, job_id: str) -> Deleted:
    """Forget a job; one that has not ended is cancelled first."""
    job = find_job(request, context, kind, job_id)
    context.store.delete(job.id)
    return Deleted(id=job.id, object="image.deleted" if kind == "image" else "video.deleted")
