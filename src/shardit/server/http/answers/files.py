"""Sends results of jobs: files with safe headers, and the JSON of synchronous image requests."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from shardit.server.http.schema.errors import ApiError
from shardit.server.http.schema.jobs import notes_of, size_of
from shardit.server.http.state.context import Context
from shardit.server.jobs.job import Job

_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
    ".wav": "audio/wav",
    ".txt": "text/plain",
}
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_SMALL = 1024 * 1024
_PIECE = 3 * 256 * 1024  # a multiple of 3, so that pieces of base64 can be joined


class ResultFile(FileResponse):
    """A file, or one range of it. Any other Range header is ignored, as HTTP allows; starlette would answer some with
    errors in a format of its own. A small file is read in advance, which saves three switches to a thread and back."""

    content: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file."""
        headers = Headers(scope=scope)
        first, last = _range_of(headers.get("range", ""))
        if not first and not last:
            scope = {**scope, "headers": [item for item in scope["headers"] if item[0] != b"range"]}
        size = int(self.headers["content-length"])
        if (int(first) >= size if first else last and int(last) == 0) and "if-range" not in headers:
            text = f"the range lies outside the file, which has {size} bytes; ask for less"
            error = ApiError(416, text, code="no_such_range", headers={"Content-Range": f"bytes */{size}"})
            await error.response()(scope, receive, send)
            return
        if self.content is None or first or last:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.content})


def _range_of(header: str) -> tuple[str, str]:
    """Return the first and the last byte; empty if open or not usable."""
    found = _RANGE.fullmatch(header.replace(" ", ""))
    first, last = found.groups() if found else ("", "")
    return ("", "") if first and last and int(first) > int(last) else (first, last)


class ImageData(BaseModel):
    """One image."""

    b64_json: str | None = Field(None, description="The file.")
    url: str | None = Field(None, description="Address of the file on this server; needs the same key.")


class ImagesAnswer(BaseModel):
    """The images of a synchronous request, in OpenAI's shape; id, seed and notes are ours."""

    created: int
    data: list[ImageData]
    output_format: Literal["png", "jpeg", "webp"]
    size: str | None
    id: str
    seed: int
    notes: list[str] = Field(description="Differences between the request and the result.")


def file_answer(context: Context, job: Job, index: int) -> ResultFile:
    """Return one result file of a job. Raises ApiError (404) if it does not exist."""
    if job.state != "completed":
        text = f"the job {job.id} is {job.state}; it has no result{'' if job.ended else ' yet'}"
        raise ApiError(404, text, code="no_result")
    if not 0 <= index < len(job.files):
        text = f"the job {job.id} has {len(job.files)} results, from 0; there is no {index}"
        raise ApiError(404, text, code="no_result")
    path = context.store.files_of(job.id) / job.files[index]
    try:
        found = path.stat()
        content = path.read_bytes() if found.st_size <= _SMALL else None
    except FileNotFoundError:
        raise ApiError(404, f"the files of {job.id} are gone", code="no_result") from None
    name = f"{job.id}-{index}{path.suffix}"
    headers = {"Cache-Control": "private, no-store", "X-Shardit-Seed": str(job.seed), "X-Shardit-Job": job.id}
    if notes := notes_of(job):
        headers["X-Shardit-Notes"] = json.dumps(notes)  # in ASCII, and in one line
    kind = _TYPES.get(path.suffix, "application/octet-stream")
    answer = ResultFile(
        path, media_type=kind, filename=name, content_disposition_type="inline", headers=headers, stat_result=found
    )
    answer.content = content
    return answer


def images_answer(context: Context, job: Job, response_format: str, base_url: str) -> StreamingResponse:
    """Return the answer to a synchronous image request: images may be large, so they are encoded piece by piece."""
    folder = context.store.files_of(job.id)
    paths = [folder / name for name in job.files]
    head = {
        "created": int(job.created_at),
        "output_format": job.view.get("output_format", "png"),
        "size": size_of(job),
        "id": job.id,
        "seed": job.seed,
        "notes": notes_of(job),
    }
    if response_format == "url":
        links = [{"url": f"{base_url}/v1/images/{job.id}/content/{index}"} for index in range(len(paths))]
        return StreamingResponse(_text(json.dumps({**head, "data": links})), media_type="application/json")
    if not all(path.is_file() for path in paths):
        raise ApiError(404, f"the files of {job.id} are gone", code="no_result")
    return StreamingResponse(_encoded(json.dumps(head), paths), media_type="application/json")


async def _text(text: str) -> AsyncIterator[bytes]:
    yield text.encode()


async def _encoded(head: str, paths: list[Path]) -> AsyncIterator[bytes]:
    yield head[:-1].encode() + b', "data": ['
    for index, path in enumerate(paths):
        yield b'%s{"b64_json": "' % (b", " if index else b"")
        with await run_in_threadpool(open, path, "rb") as file:
            while piece := await run_in_threadpool(file.read, _PIECE):
                yield base64.b64encode(piece)
        yield b'"}'
    yield b"]}"
