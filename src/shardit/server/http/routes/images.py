"""/v1/images"""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from shardit.server.http.answers.files import ImagesAnswer, file_answer, images_answer
from shardit.server.http.answers.waiting import check_completed, until_ended
from shardit.server.http.routes.jobs import add_job_routes, base_url, find_job, show
from shardit.server.http.schema.errors import answers
from shardit.server.http.schema.jobs import ImageJob, ImageJobs
from shardit.server.http.schema.openapi import FILE, PREFER, binary, body
from shardit.server.http.state.context import Context
from shardit.server.http.submit.submit import submit_job

_POST = answers(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503)


def image_routes(context: Context) -> APIRouter:
    """Return the routes under /v1/images."""
    router = APIRouter(prefix="/v1/images", tags=["images"])
    accepted: dict[int | str, dict[str, Any]] = {
        202: {"model": ImageJob, "description": "A job, with the header Prefer."}
    }

    @router.post(
        "/generations",
        response_model=ImagesAnswer,
        responses={**accepted, **_POST},
        openapi_extra={**body("image"), **PREFER},
    )
    async def generate_images(request: Request) -> Response:
        """Make images and wait for them; with the header `Prefer: respond-async`, get a job instead."""
        return await _make(request, context, context.fields.image, needs_image=False)

    @router.post(
        "/edits",
        response_model=ImagesAnswer,
        responses={**accepted, **_POST},
        openapi_extra={**body("edit"), **PREFER},
    )
    async def edit_images(request: Request) -> Response:
        """Make images from images: uploads in `image` or `image[]`."""
        return await _make(request, context, context.fields.edit, needs_image=True)

    others: Any = {200: {"content": {"image/jpeg": {"schema": FILE}, "image/webp": {"schema": FILE}}}}

    @router.get("/{job_id}/content/{index}", **binary("image/png"), responses={**others, **answers(400, 401, 404, 416)})
    def image_content(request: Request, job_id: str, index: int) -> FileResponse:
        """One image, as a PNG, JPEG or WebP file, as requested."""
        return file_answer(context, find_job(request, context, "image", job_id), index)

    add_job_routes(router, context, "image", ImageJob, ImageJobs)
    return router


async def _make(request: Request, context: Context, model: type[BaseModel], *, needs_image: bool) -> Response:
    later = "respond-async" in re.split(r"[\s,;]+", ",".join(request.headers.getlist("prefer")).lower())
    accepted = await submit_job(request, context, "image", model, waits=not later, needs_image=needs_image)
    job = accepted.job
    request.scope["state"]["job"] = job.id
    if later:
        shown = await run_in_threadpool(show, request, context, job)
        headers = {"Location": f"/v1/images/{job.id}", "Preference-Applied": "respond-async"}
        return JSONResponse(shown.model_dump(), 202, headers)
    job = await until_ended(request, context, job)
    check_completed(job)
    return images_answer(context, job, accepted.response_format, base_url(request))
