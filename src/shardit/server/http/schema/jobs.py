"""Jobs as clients see them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from shardit.server.http.schema.job_errors import JobError, job_error
from shardit.server.jobs.job import Job
from shardit.server.messages import StepDone

SECONDS_A_DAY = 86400.0


class ImageLink(BaseModel):
    """One result of an image job."""

    url: str


class JobView(BaseModel):
    """Fields of all kinds of jobs. Times are whole seconds since 1970."""

    id: str
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int = Field(ge=0, le=100, description="Percent of the denoising steps.")
    created_at: int
    completed_at: int | None = Field(description="Time of the end, in any state.")
    expires_at: int | None = Field(description="Time from which its files may be deleted.")
    prompt: str | None
    size: str = Field(description='WIDTHxHEIGHT, or "auto" if the pipeline decides.')
    error: JobError | None
    n: int = Field(description="Number of requested results.")
    seed: int
    position: int | None = Field(description="Number of jobs ahead in the queue; null once it has begun.")
    phase: Literal["encode", "denoise", "decode"] | None
    step: int | None
    steps: int | None
    seconds_per_step: float | None
    seconds_left: float | None = Field(description="Estimated seconds to the last step.")
    attempts: int = Field(description="Number of starts; more than 1 after a failure of ranks.")
    cancel_requested: bool
    seconds_taken: float | None
    notes: list[str] = Field(description="Differences between the request and the result.")
    parameters: dict[str, Any] = Field(description="The checked arguments of the pipeline.")
    input_images: int


class ImageJob(JobView):
    """An image job."""

    object: Literal["image"] = "image"
    output_format: Literal["png", "jpeg", "webp"]
    output_compression: int | None = Field(description="Quality of jpeg and webp; null: 100.")
    data: list[ImageLink] | None = Field(description="The results; null before the end.")


class VideoJob(JobView):
    """A video job, in OpenAI's format with additional fields of this server."""

    object: Literal["video"] = "video"
    seconds: str = Field(description='Length, or "auto" if the pipeline decides.')
    fps: float | None
    num_frames: int | None
    remixed_from_video_id: None = None


class FileLink(BaseModel):
    """One result file."""

    url: str
    name: str


class GenerationJob(JobView):
    """A job of a model that makes sound, text or numbers."""

    object: Literal["generation"] = "generation"
    sample_rate: int | None = Field(description="Samples per second of sound.")
    data: list[FileLink] | None = Field(description="The results; null before the end.")


class GenerationJobs(BaseModel):
    """A page of such jobs."""

    object: Literal["list"] = "list"
    data: list[GenerationJob]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ImageJobs(BaseModel):
    """A page of image jobs."""

    object: Literal["list"] = "list"
    data: list[ImageJob]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoJobs(BaseModel):
    """A page of video jobs."""

    object: Literal["list"] = "list"
    data: list[VideoJob]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A job was deleted."""

    id: str
    object: Literal["image.deleted", "video.deleted", "generation.deleted"]
    deleted: Literal[True] = True


def view(
    job: Job, *, model: str, base_url: str, position: int | None, step: StepDone | None, keep_days: float
) -> ImageJob | VideoJob | GenerationJob:
    """Return the present view of a job. model: of jobs that an older version stored without a name.
    step: the latest known progress. position: its place in the queue."""
    shown = job.view
    common = {
        "id": job.id,
        "model": shown.get("model", model),  # a later server may serve another
        "status": job.state,
        "progress": _progress(job, step),
        "created_at": int(job.created_at),
        "completed_at": None if job.finished_at is None else int(job.finished_at),
        "expires_at": None if job.finished_at is None else int(job.finished_at + keep_days * SECONDS_A_DAY),
        "prompt": job.request.get("prompt"),
        "size": size_of(job) or "auto",
        "error": job_error(job),
        "n": shown.get("n", 1),
        "seed": job.seed,
        "position": position if job.state == "queued" else None,
        **progress_of(step if job.state == "in_progress" else None),
        "attempts": job.attempts,
        "cancel_requested": job.cancel_requested,
        "seconds_taken": None if not (job.finished_at and job.started_at) else job.finished_at - job.started_at,
        "notes": notes_of(job),
        "parameters": {name: value for name, value in job.request.items() if name != "prompt"},
        "input_images": len(job.inputs),
    }
    if job.kind == "image":
        links = [ImageLink(url=f"{base_url}/v1/images/{job.id}/content/{index}") for index in range(len(job.files))]
        encoding = {
            "output_format": shown.get("output_format", "png"),
            "output_compression": shown.get("output_compression"),
        }
        return ImageJob(**common, **encoding, data=links or None)
    if job.kind == "generation":
        base = f"{base_url}/v1/generations/{job.id}/content"
        files = [FileLink(url=f"{base}/{index}", name=name) for index, name in enumerate(job.files)]
        return GenerationJob(**common, sample_rate=job.details.get("sample_rate"), data=files or None)
    return VideoJob(
        **common,
        seconds=_seconds_of(job) or "auto",
        fps=shown.get("fps"),
        num_frames=job.details.get("num_frames") or job.request.get("num_frames"),
    )


def progress_of(step: StepDone | None) -> dict[str, Any]:
    """Return the fields about a step."""
    if step is None:
        return dict.fromkeys(("phase", "step", "steps", "seconds_per_step", "seconds_left"))
    pace = step.seconds_per_step
    return {
        "phase": step.phase,
        "step": step.step,
        "steps": step.total,
        "seconds_per_step": pace,
        "seconds_left": None if pace is None else round(pace * max(0, step.total - step.step), 3),
    }


def percent(step: StepDone | None) -> int:
    """Return the progress of a running job in percent; 100 is reserved for finished jobs."""
    return 0 if step is None or step.total < 1 else min(99, 100 * step.step // step.total)


def _progress(job: Job, step: StepDone | None) -> int:
    if job.state == "completed":
        return 100
    return percent(step) if job.state == "in_progress" else 0


def notes_of(job: Job) -> list[str]:
    """Return the differences from the request, once the job has ended."""
    return [str(note) for note in job.details.get("notes", ())]


def size_of(job: Job) -> str | None:
    """Return the size of its results, or the requested size while there are none; None if the pipeline decides."""
    made = [job.details.get(name) for name in ("width", "height")]  # pipelines round sizes
    return f"{made[0]}x{made[1]}" if all(made) else job.view.get("size")


def _seconds_of(job: Job) -> str | None:
    frames, fps = (job.details.get(name) for name in ("num_frames", "fps"))  # they round lengths, too
    return length(frames, fps) if frames and fps else job.view.get("seconds")


def length(frames: int, fps: float) -> str:
    """Return the seconds of a video, as the text that OpenAI's client knows."""
    return f"{round((frames - 1) / fps, 3):g}"
