"""Jobs over HTTP: made, waited for, followed, listed, cancelled, deleted; their files; clients that go."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from shardit.server.http.answers import events as http_events
from shardit.server.http.state.live_state import LiveState
from shardit.server.jobs.job import NewJob
from shardit.server.jobs.store import Store
from shardit.settings.model_options import ModelOptions
from tests.support.http_calls import LATER, NOW, events, open_job
from tests.support.http_fake import WAIT_S, Served, serving


def test_a_job_of_an_image(images: Served) -> None:
    asked = {"prompt": "a cat", "n": 2, "seed": 5, "size": "48x40", "priority": 1}
    status, job, headers = images.call("POST", NOW, asked, LATER)
    assert status == 202
    assert headers["location"] == f"/v1/images/{job['id']}"
    done = images.until(headers["location"], "completed")
    assert (done["object"], done["seed"], done["size"], done["n"], done["progress"]) == ("image", 5, "48x40", 2, 100)
    assert done["parameters"]["num_inference_steps"] == 3  # of tiny models, at their own small size
    for link in done["data"]:
        status, content, headers = images.call("GET", link["url"].removeprefix(images.url))
        assert status == 200
        assert content.startswith(b"\x89PNG")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "private, no-store"
        assert headers["content-disposition"].startswith("inline; filename=")
        assert "sandbox" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
    assert images.call("GET", f"/v1/images/{job['id']}/content/2")[0] == 404
    assert images.call("GET", f"/v1/images/{job['id']}/content/x")[0] == 400
    status, gone, _ = images.call("DELETE", f"/v1/images/{job['id']}")
    assert gone == {"id": job["id"], "object": "image.deleted", "deleted": True}
    assert images.call("GET", f"/v1/images/{job['id']}")[0] == 404


def test_a_synchronous_video(videos: Served) -> None:
    status, content, headers = videos.call("POST", "/v1/videos/sync", {"prompt": "a cat", "size": "64x32", "seed": 3})
    assert status == 200
    assert headers["content-type"] == "video/mp4"
    assert headers["x-shardit-seed"] == "3"
    assert content[4:8] == b"ftyp"
    status, part, headers = videos.call(
        "GET", f"/v1/videos/{headers['x-shardit-job']}/content", headers={"Range": "bytes=4-7"}
    )
    assert (status, part) == (206, b"ftyp")


@pytest.mark.parametrize("response_format", ["b64_json", "url"])
def test_a_synchronous_answer_has_the_notes(images: Served, videos: Served, response_format: str) -> None:
    asked = {"prompt": "a note", "response_format": response_format}
    assert images.call("POST", NOW, asked)[1]["notes"] == ["it was rounded"]
    assert images.call("POST", NOW, {**asked, "prompt": "a cat"})[1]["notes"] == []
    _, _, headers = videos.call("POST", "/v1/videos/sync", {"prompt": "a note", "size": "64x32"})
    assert json.loads(headers["x-shardit-notes"]) == ["it was rounded"]
    _, _, headers = videos.call("POST", "/v1/videos/sync", {"prompt": "a cat", "size": "64x32"})
    assert "x-shardit-notes" not in headers


@pytest.mark.parametrize(
    ("asked", "status", "got"),
    [
        ("bytes=4-7", 206, slice(4, 8)),
        ("bytes=-4", 206, slice(-4, None)),
        ("bytes=4-", 206, slice(4, None)),
        ("bytes=0-999999999", 206, slice(None)),
        ("bytes=9-3", 200, slice(None)),
        ("bytes=x", 200, slice(None)),
        ("bytes=0-1,4-5", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
        ("bytes=999999999-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
def test_ranges_of_files(images: Served, asked: str, status: int, got: slice | None) -> None:
    path = a_file(images)
    whole = images.call("GET", path)[1]
    found, part, headers = images.call("GET", path, headers={"Range": asked})
    assert found == status
    if got is None:
        assert (part["error"]["code"], headers["content-range"]) == ("no_such_range", f"bytes */{len(whole)}")
    else:
        assert part == whole[got]
        assert headers["content-length"] == str(len(part))
    if status == 206:
        etag = images.call("GET", path)[2]["etag"]
        assert images.call("GET", path, headers={"Range": asked, "If-Range": etag})[0] == 206
        assert images.call("GET", path, headers={"Range": asked, "If-Range": '"other"'})[1] == whole


def a_file(images: Served) -> str:
    """Where a result can be had."""
    jobs = images.call("GET", "/v1/images?limit=100")[1]["data"]
    job = next((job for job in jobs if job["prompt"] == "a file"), None)
    job = job or images.until(images.call("POST", NOW, {"prompt": "a file"}, LATER)[2]["location"], "completed")
    return f"/v1/images/{job['id']}/content/0"


def test_head_is_get_without_a_body(images: Served) -> None:
    for path in (a_file(images), "/", "/health", "/ready", "/v1/models", "/v1/images", "/v1/nothing"):
        status, _, headers = images.call("GET", path)
        found, body, without = images.call("HEAD", path)
        assert (found, not body) == (status, True)
        assert without["content-length"] == headers["content-length"]
        assert without["content-type"] == headers["content-type"]
    assert images.call("HEAD", "/v1/images/generations")[0] == 404  # no job of that name
    assert b'method="HEAD"' in images.call("GET", "/metrics")[1]


@pytest.mark.parametrize(
    ("prefer", "status"),
    [
        ("respond-async", 202),
        ("Respond-Async, wait=10", 202),
        ("return=minimal; respond-async", 202),
        ("wait=10", 200),
        ("respond-asynchronously", 200),
        ("", 200),
    ],
)
def test_prefer_respond_async(images: Served, prefer: str, status: int) -> None:
    found, _, headers = images.call("POST", NOW, {"prompt": "a cat"}, {"Prefer": prefer})
    assert found == status
    assert headers.get("preference-applied") == ("respond-async" if status == 202 else None)


def test_a_preference_in_a_line_of_its_own(images: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", images.port, timeout=WAIT_S)
    connection.putrequest("POST", NOW)
    for name, value in (("Content-Type", "application/json"), ("Prefer", "wait=5"), ("Prefer", "respond-async")):
        connection.putheader(name, value)
    body = b'{"prompt": "a cat"}'
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    assert connection.getresponse().status == 202
    connection.close()


def test_reported_size_is_that_of_the_picture(images: Served) -> None:
    answer = images.call("POST", NOW, {"prompt": "a cat", "size": "100x100"})[1]
    job = images.call("GET", f"/v1/images/{answer['id']}")[1]
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as made:
        assert answer["size"] == job["size"] == f"{made.width}x{made.height}" == "64x64"


def test_drawn_seeds_are_reported(images: Served) -> None:
    seeds = {images.call("POST", NOW, {"prompt": "a cat"})[1]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_lists_are_paged(images: Served) -> None:
    made = [images.call("POST", NOW, {"prompt": "page"}, LATER)[1]["id"] for _ in range(3)]
    _, page, _ = images.call("GET", "/v1/images?limit=2")
    assert [job["id"] for job in page["data"]] == made[:0:-1]
    assert (page["has_more"], page["last_id"]) == (True, made[1])
    _, rest, _ = images.call("GET", f"/v1/images?limit=2&after={made[1]}")
    assert rest["data"][0]["id"] == made[0]
    _, upward, _ = images.call("GET", f"/v1/images?order=asc&after={made[1]}")
    assert [job["id"] for job in upward["data"]] == made[2:]
    for wrong in ("limit=0", "limit=101", "limit=x", "order=up", "after=image_1"):
        status, answer, _ = images.call("GET", f"/v1/images?{wrong}")
        assert status == 400
        assert answer["error"]["param"] == wrong.split("=")[0]


def test_failed_jobs(images: Served, videos: Served) -> None:
    status, answer, headers = images.call("POST", NOW, {"prompt": "fail"})
    assert (status, answer["error"]["code"]) == (500, "ranks_died")
    assert headers["x-should-retry"] == "false"
    _, job, _ = videos.call("POST", "/v1/videos", {"prompt": "fail"})
    failed = videos.until(f"/v1/videos/{job['id']}", "failed")
    assert failed["error"] == {"code": "ranks_died", "message": "a rank died", "param": None}
    assert videos.call("GET", f"/v1/videos/{job['id']}/content")[0] == 404


def test_cancel(videos: Served) -> None:
    _, job, _ = videos.call("POST", "/v1/videos", {"prompt": "slow"})
    path = f"/v1/videos/{job['id']}"
    videos.until(path, "in_progress")
    _, waiting, _ = videos.call("POST", "/v1/videos", {"prompt": "slow"})
    assert waiting["position"] == 0
    status, cancelled, _ = videos.call("POST", f"/v1/videos/{waiting['id']}/cancel")
    assert (status, cancelled["status"]) == (200, "cancelled")
    videos.call("POST", f"{path}/cancel")
    assert videos.until(path, "cancelled")["error"]["code"] == "cancelled"
    assert videos.call("POST", f"{path}/cancel")[1]["status"] == "cancelled"  # once more changes nothing


def test_a_deleted_job_ends_its_waiting_client(images: Served) -> None:
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(images.call("POST", NOW, {"prompt": "slow"})))
    asking.start()
    job = open_job(images)
    assert images.call("DELETE", f"/v1/images/{job}")[0] == 200
    asking.join(WAIT_S)
    assert answers[0][0] == 404


def test_idempotency(images: Served) -> None:
    headers = {**LATER, "Idempotency-Key": "once"}
    _, first, _ = images.call("POST", NOW, {"prompt": "a cat"}, headers)
    _, again, _ = images.call("POST", NOW, {"prompt": "a cat", "user": None}, headers)
    assert first["id"] == again["id"]
    status, answer, _ = images.call("POST", NOW, {"prompt": "a dog"}, headers)
    assert (status, answer["error"]["code"]) == (409, "idempotency_conflict")
    done = images.call("POST", NOW, {"prompt": "a cat"}, {"Idempotency-Key": "once"})[1]
    assert done["id"] == first["id"]
    assert images.call("POST", NOW, {"prompt": "a cat"}, {"Idempotency-Key": "a b"})[0] == 400
    connection = http.client.HTTPConnection("127.0.0.1", images.port)
    connection.putrequest("POST", NOW)
    for name, value in (("Idempotency-Key", "a"), ("Idempotency-Key", "b"), ("Content-Length", "2")):
        connection.putheader(name, value)
    connection.endheaders(b"{}")
    assert b"given once" in connection.getresponse().read()
    connection.close()


def test_a_job_belongs_to_its_model(tmp_path: Path) -> None:
    once, name = {**LATER, "Idempotency-Key": "once"}, {"served_model_name": "a/name"}
    with serving(tmp_path, **name) as served:
        first = served.call("POST", NOW, {"prompt": "a cat"}, once)[1]
        served.until(f"/v1/images/{first['id']}", "completed")
    with serving(tmp_path, **name) as served:  # the same model again
        assert served.call("POST", NOW, {"prompt": "a cat"}, once)[1]["id"] == first["id"]
    for other in ({"model": "tiny/flux"}, {"loading": ModelOptions(vae_tiling=True)}, {"dtype": "bfloat16"}):
        with serving(tmp_path, **{**name, **other}) as served:
            status, answer, _ = served.call("POST", NOW, {"prompt": "a cat"}, once)
            assert (status, answer["error"]["code"]) == (409, "idempotency_conflict"), other
    with serving(tmp_path, model="tiny/flux") as served:
        assert [job["model"] for job in served.call("GET", "/v1/images")[1]["data"]] == ["a/name"]


def test_events(videos: Served) -> None:
    videos.supervisor.held = True
    _, job, _ = videos.call("POST", "/v1/videos", {"prompt": "a steady cat"})
    seen: list[tuple[str, Any]] = []
    following = threading.Thread(target=lambda: seen.extend(events(videos, job["id"])))
    following.start()
    time.sleep(0.3)
    videos.supervisor.held = False
    following.join(WAIT_S)
    assert seen[0] == ("queued", {"position": 0})
    names = [name for name, _ in seen]
    assert names == ["queued", *["step"] * (len(seen) - 2), "finished"]
    assert seen[-1][1] == {"status": "completed", "error": None}
    steps = [data for name, data in seen if name == "step"]
    assert {"phase": "denoise", "step": 1, "steps": 30}.items() <= steps[0].items() or len(steps) > 1
    assert [data["step"] for data in steps] == sorted(data["step"] for data in steps)
    assert steps[-1]["seconds_left"] >= 0
    assert events(videos, job["id"]) == [seen[-1]]  # after its end, too


def test_silent_streams_send_keepalives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_events, "KEEPALIVE_INTERVAL_S", 0.02)
    monkeypatch.setattr(http_events, "POLL_INTERVAL_S", 0.01)
    store = Store(tmp_path)
    new = NewJob(kind="video", request={"prompt": "x"}, seed=1, cost=1.0)
    job, _ = store.accept(new, queue_size=9)

    async def follow() -> list[bytes]:
        context: Any = SimpleNamespace(store=store, live_state=LiveState(lambda message: None))
        got = []
        async for piece in http_events.events(context, job):
            got.append(piece)
            if len(got) == 4:
                store.request_cancel(job.id)
            assert len(got) < 1000
        return got

    got = asyncio.run(asyncio.wait_for(follow(), WAIT_S))
    assert got[0].startswith(b"event: queued\n")
    assert got[1:4] == [b": still here\n\n"] * 3
    assert got[-1].startswith(b"event: finished\n")
    store.close()


def test_a_lost_message_loses_nothing(images: Served) -> None:
    images.supervisor.lossy = True
    try:
        assert images.call("POST", NOW, {"prompt": "a cat"})[0] == 200
    finally:
        images.supervisor.lossy = False


def test_a_client_that_goes_cancels_its_job(images: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", images.port, timeout=WAIT_S)
    connection.request("POST", NOW, json.dumps({"prompt": "slow"}), {"Content-Type": "application/json"})
    job = open_job(images)
    connection.close()
    images.until(f"/v1/images/{job}", "cancelled")


def test_with_an_idempotency_key_the_job_goes_on(images: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", images.port, timeout=WAIT_S)
    headers = {"Content-Type": "application/json", "Idempotency-Key": "comes-back"}
    connection.request("POST", NOW, json.dumps({"prompt": "steady"}), headers)
    job = open_job(images, "steady")
    connection.close()
    status, answer, _ = images.call("POST", NOW, {"prompt": "steady"}, {"Idempotency-Key": "comes-back"})
    assert (status, answer["id"]) == (200, job)
