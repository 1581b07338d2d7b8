"""/v1/videos"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from shardit.server.http.answers.files import file_answer
from shardit.server.http.answers.waiting import check_completed, until_ended
from shardit.server.http.routes.jobs import add_job_routes, find_job, show
from shardit.server.http.schema.errors import answers
from shardit.server.http.schema.jobs import VideoJob, VideoJobs
from shardit.server.http.schema.openapi import binary, body
from shardit.server.http.state.context import Context
from shardit.server.http.submit.submit import submit_job

_POST = (400, 401, 403, 404, 408, 409, 413, 415, 429, 503)


def video_routes(context: Context) -> APIRouter:
    """Return the routes under /v1/videos."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    @router.post(
        "",
        response_model=VideoJob,
        responses=answers(*_POST),
        openapi_extra=body("video"),
    )
    async def create_video(request: Request, response: Response) -> Any:
        """Start a video job."""
        accepted = await submit_job(request, context, "video", context.fields.video, waits=False)
        request.scope["state"]["job"] = accepted.job.id
        response.headers["Location"] = f"/v1/videos/{accepted.job.id}"
        return await run_in_threadpool(show, request, context, accepted.job)

    @router.post(
        "/sync",
        **binary("video/mp4"),
        responses=answers(*_POST, 500),
        openapi_extra=body("video"),
    )
    async def create_video_and_wait(request: Request) -> Response:
        """Make a video and wait for it: the answer is the MP4 file, so n must be 1."""
        accepted = await submit_job(request, context, "video", context.fields.video, waits=True, one=True)
        request.scope["state"]["job"] = accepted.job.id
        job = await until_ended(request, context, accepted.job)
        check_completed(job)
        return await run_in_threadpool(file_answer, context, job, 0)

    @router.get("/{job_id}/content", **binary("video/mp4"), responses=answers(400, 401, 404, 416))
    def video_content(
        request: Request, job_id: str, variant: Literal["video"] = "video", index: Annotated[int, Query(ge=0)] = 0
    ) -> FileResponse:
        """The video, as an MP4 file; `index` chooses one if n was above 1."""
        return file_answer(context, find_job(request, context, "video", job_id), index)

    add_job_routes(router, context, "video", VideoJob, VideoJobs)
    return router
