"""/v1/videos"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from . import jobs
from .accept import accept
from .context import Context
from .document import EVENTS, binary, body_of
from .errors import answers
from .events import DESCRIPTION, job_events
from .results import file_answer
from .views import Deleted, VideoJob, VideoJobs
from .waiting import check_completed, until_ended

_POST = (400, 401, 403, 404, 408, 409, 413, 415, 429, 503)
_UPLOADS = ("input_reference", "image", "image[]")


def video_routes(context: Context) -> APIRouter:
    """The routes under /v1/videos."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    @router.post(
        "",
        response_model=VideoJob,
        responses=answers(*_POST),
        openapi_extra=body_of(context.fields.video, uploads=_UPLOADS),
    )
    async def create_video(request: Request, response: Response) -> Any:
        """Start a video job."""
        accepted = await accept(request, context, "video", context.fields.video, waits=False)
        request.scope["state"]["job"] = accepted.job.id
        response.headers["Location"] = f"/v1/videos/{accepted.job.id}"
        return await run_in_threadpool(jobs.show, request, context, accepted.job)

    @router.post(
        "/sync",
        **binary("video/mp4"),
        responses=answers(*_POST, 500),
        openapi_extra=body_of(context.fields.video, uploads=_UPLOADS),
    )
    async def create_video_and_wait(request: Request) -> Response:
        """Make a video and wait for it: the answer is the MP4 file. With n above 1, that of the first video; the header
        X-Shardit-Job names the job, which has all."""
        accepted = await accept(request, context, "video", context.fields.video, waits=True)
        request.scope["state"]["job"] = accepted.job.id
        job = await until_ended(request, context, accepted.job)
        check_completed(job)
        return await run_in_threadpool(file_answer, context, job, 0)

    @router.get("", response_model=VideoJobs, responses=answers(400, 401))
    def list_videos(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        """Video jobs, the newest first."""
        return jobs.list_jobs(request, context, "video", after, limit, order)

    @router.get("/{video_id}", response_model=VideoJob, responses=answers(401, 404))
    def retrieve_video(request: Request, response: Response, video_id: str) -> Any:
        """A video job as it is now."""
        job = jobs.find_job(request, context, "video", video_id)
        if not job.ended:
            response.headers["openai-poll-after-ms"] = "500"
        return jobs.show(request, context, job)

    @router.delete("/{video_id}", response_model=Deleted, responses=answers(401, 403, 404, 503))
    async def delete_video(request: Request, video_id: str) -> Any:
        """Forget a video job and its files; if it has not ended, it is cancelled first."""
        gone = await run_in_threadpool(jobs.delete_job, request, context, "video", video_id)
        context.board.changed_here(video_id)
        return gone

    @router.post("/{video_id}/cancel", response_model=VideoJob, responses=answers(401, 403, 404, 503))
    async def cancel_video(request: Request, video_id: str) -> Any:
        """Cancel a video job, within a step if it runs; one that has ended stays as it is."""
        job = await run_in_threadpool(jobs.cancel_job, request, context, "video", video_id)
        context.board.changed_here(video_id)
        return await run_in_threadpool(jobs.show, request, context, job)

    @router.get("/{video_id}/content", **binary("video/mp4"), responses=answers(400, 401, 404, 416))
    def video_content(
        request: Request, video_id: str, variant: Literal["video"] = "video", index: Annotated[int, Query(ge=0)] = 0
    ) -> FileResponse:
        """The video, as an MP4 file; `index` chooses one where n was above 1."""
        return file_answer(context, jobs.find_job(request, context, "video", video_id), index)

    @router.get("/{video_id}/events", **EVENTS, description=DESCRIPTION, responses=answers(401, 404))
    async def video_events(request: Request, video_id: str) -> StreamingResponse:
        job = await run_in_threadpool(jobs.find_job, request, context, "video", video_id)
        return StreamingResponse(job_events(context, job), media_type="text/event-stream")

    return router
