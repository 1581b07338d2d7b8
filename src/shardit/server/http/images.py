"""/v1/images"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from . import jobs
from .accept import accept
from .context import Context
from .document import EVENTS, PREFER, binary, body_of
from .errors import answers
from .events import DESCRIPTION, job_events
from .results import ImagesAnswer, file_answer, images_answer
from .views import Deleted, ImageJob, ImageJobs
from .waiting import check_completed, until_ended

_POST = answers(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503)


def image_routes(context: Context) -> APIRouter:
    """The routes under /v1/images."""
    router = APIRouter(prefix="/v1/images", tags=["images"])
    accepted: dict[int | str, dict[str, Any]] = {
        202: {"model": ImageJob, "description": "A job, with the header Prefer."}
    }

    @router.post(
        "/generations",
        response_model=ImagesAnswer,
        responses={**accepted, **_POST},
        openapi_extra={**body_of(context.fields.image), **PREFER},
    )
    async def generate_images(request: Request) -> Response:
        """Make pictures and wait for them; with the header `Prefer: respond-async`, get a job instead."""
        return await _make(request, context, context.fields.image, needs_picture=False)

    @router.post(
        "/edits",
        response_model=ImagesAnswer,
        responses={**accepted, **_POST},
        openapi_extra={**body_of(context.fields.edit, uploads=("image", "image[]")), **PREFER},
    )
    async def edit_images(request: Request) -> Response:
        """Make pictures from pictures: uploads in `image` or `image[]`."""
        return await _make(request, context, context.fields.edit, needs_picture=True)

    @router.get("", response_model=ImageJobs, responses=answers(400, 401))
    def list_images(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        """Image jobs, the newest first. Ours, not OpenAI's."""
        return jobs.list_jobs(request, context, "image", after, limit, order)

    @router.get("/{image_id}", response_model=ImageJob, responses=answers(401, 404))
    def retrieve_image(request: Request, image_id: str) -> Any:
        """An image job as it is now."""
        return jobs.show(request, context, jobs.find_job(request, context, "image", image_id))

    @router.delete("/{image_id}", response_model=Deleted, responses=answers(401, 403, 404, 503))
    async def delete_image(request: Request, image_id: str) -> Any:
        """Forget an image job and its files; if it has not ended, it is cancelled first."""
        gone = await run_in_threadpool(jobs.delete_job, request, context, "image", image_id)
        context.board.changed_here(image_id)
        return gone

    @router.post("/{image_id}/cancel", response_model=ImageJob, responses=answers(401, 403, 404, 503))
    async def cancel_image(request: Request, image_id: str) -> Any:
        """Cancel an image job, within a step if it runs; one that has ended stays as it is."""
        job = await run_in_threadpool(jobs.cancel_job, request, context, "image", image_id)
        context.board.changed_here(image_id)
        return await run_in_threadpool(jobs.show, request, context, job)

    @router.get("/{image_id}/content/{index}", **binary("image/png"), responses=answers(400, 401, 404, 416))
    def image_content(request: Request, image_id: str, index: int) -> FileResponse:
        """One picture, as a PNG file."""
        return file_answer(context, jobs.find_job(request, context, "image", image_id), index)

    @router.get("/{image_id}/events", **EVENTS, description=DESCRIPTION, responses=answers(401, 404))
    async def image_events(request: Request, image_id: str) -> StreamingResponse:
        job = await run_in_threadpool(jobs.find_job, request, context, "image", image_id)
        return StreamingResponse(job_events(context, job), media_type="text/event-stream")

    return router


async def _make(request: Request, context: Context, model: type[BaseModel], *, needs_picture: bool) -> Response:
    later = "respond-async" in re.split(r"[\s,;]+", request.headers.get("prefer", "").lower())
    accepted = await accept(request, context, "image", model, waits=not later, needs_picture=needs_picture)
    job = accepted.job
    request.scope["state"]["job"] = job.id
    if later:
        shown = await run_in_threadpool(jobs.show, request, context, job)
        headers = {"Location": f"/v1/images/{job.id}", "Preference-Applied": "respond-async"}
        return JSONResponse(shown.model_dump(), 202, headers)
    job = await until_ended(request, context, job)
    check_completed(job)
    return images_answer(context, job, accepted.response_format, jobs.base_url(request))
