"""Frequent calls of the tests of the HTTP interface."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from tests.support.http_fake import WAIT_S, Served, form

NOW, LATER = "/v1/images/generations", {"Prefer": "respond-async"}


def error_of(served: Served, path: str, body: Any, status: int, headers: dict[str, str] | None = None) -> Any:
    got, answer, _ = served.call("POST", path, body, headers)
    assert got == status, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]
    return answer["error"]


def open_job(served: Served, prompt: str = "slow") -> str:
    """The id of the job with this prompt that has not ended, once there is one."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        for job in served.call("GET", "/v1/images?limit=5")[1]["data"]:
            if job["prompt"] == prompt and job["status"] in ("queued", "in_progress"):
                return job["id"]
        time.sleep(0.02)
    raise AssertionError("no such job")


def events(served: Served, job_id: str) -> list[tuple[str, Any]]:
    status, text, headers = served.call("GET", f"/v1/videos/{job_id}/events")
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    blocks = [block.splitlines() for block in text.decode().split("\n\n") if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def ignoring_errors(work: Any) -> Any:
    def run() -> None:
        with contextlib.suppress(OSError):
            work()

    return run


def edit(served: Served, *files: bytes, **fields: Any) -> tuple[int, Any]:
    """Status and answer of a request to change these pictures."""
    data, kind = form({"prompt": "brighter", **fields, "image[]": [("../../x.png", file) for file in files]})
    return served.call("POST", "/v1/images/edits", data, {"Content-Type": kind})[:2]
