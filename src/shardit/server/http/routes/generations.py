"""/v1/generations: sound, text and numbers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from shardit.server.http.answers.files import file_answer
from shardit.server.http.answers.waiting import check_completed, until_ended
from shardit.server.http.routes.jobs import add_job_routes, find_job, show
from shardit.server.http.schema.errors import answers
from shardit.server.http.schema.jobs import GenerationJob, GenerationJobs
from shardit.server.http.schema.openapi import binary, body
from shardit.server.http.state.context import Context
from shardit.server.http.submit.submit import submit_job

_POST = (400, 401, 403, 404, 408, 409, 413, 415, 429, 503)
_FILE = "application/octet-stream"


def generation_routes(context: Context) -> APIRouter:
    """Return the routes under /v1/generations."""
    router = APIRouter(prefix="/v1/generations", tags=["generations"])

    @router.post("", response_model=GenerationJob, responses=answers(*_POST), openapi_extra=body("generation"))
    async def create_generation(request: Request, response: Response) -> Any:
        """Start a job of a model that makes sound (WAV files), text, or numbers (safetensors files)."""
        accepted = await submit_job(request, context, "generation", context.fields.generation, waits=False)
        request.scope["state"]["job"] = accepted.job.id
        response.headers["Location"] = f"/v1/generations/{accepted.job.id}"
        return await run_in_threadpool(show, request, context, accepted.job)

    @router.post("/sync", **binary(_FILE), responses=answers(*_POST, 500), openapi_extra=body("generation"))
    async def create_generation_and_wait(request: Request) -> Response:
        """The same, and wait: the answer is the file, so n must be 1."""
        accepted = await submit_job(request, context, "generation", context.fields.generation, waits=True, one=True)
        request.scope["state"]["job"] = accepted.job.id
        job = await until_ended(request, context, accepted.job)
        check_completed(job)
        return await run_in_threadpool(file_answer, context, job, 0)

    @router.get("/{job_id}/content/{index}", **binary(_FILE), responses=answers(400, 401, 404, 416))
    def generation_content(request: Request, job_id: str, index: int) -> FileResponse:
        """One result file."""
        return file_answer(context, find_job(request, context, "generation", job_id), index)

    add_job_routes(router, context, "generation", GenerationJob, GenerationJobs)
    return router
