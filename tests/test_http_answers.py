"""What the API process answers: jobs and their ends, errors, events, and what it does when others fail."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shardit.server.messages import Ranks

from .http_fake import VIDEO, WAIT_S, Served, form, picture, serving

NOW, LATER = "/v1/images/generations", {"Prefer": "respond-async"}


def error_of(served: Served, path: str, body: Any, status: int, headers: dict[str, str] | None = None) -> Any:
    got, answer, _ = served.call("POST", path, body, headers)
    assert got == status, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]
    return answer["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "64"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"size": "64x64", "width": 32}, "size"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": 2, "num_outputs_per_prompt": 3}, "n"),
        ({"n": True}, "n"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"num_inference_steps": "4"}, "num_inference_steps"),
        ({"sigmas": [0.5] * 201}, "sigmas"),
        ({"sigmas": [-1.0]}, "sigmas"),
        ({"sigmas": ["x"]}, "sigmas"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"prompt": "\ud800"}, None),
        ({"max_sequence_length": 10**6}, "max_sequence_length"),
        ({"width": 10**9, "height": 1}, "width"),
        ({"quality": "hd"}, "quality"),
        ({"user": "me"}, "user"),
        ({"style": "vivid"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"output_compression": 50}, "output_compression"),
        ({"stream": True}, "stream"),
        ({"stream": 0}, "stream"),
        ({"response_format": "path"}, "response_format"),
        ({"promt": "x"}, "promt"),
        ({"num_frames": 9}, None),
        ({"strength": 0.5}, None),
        ({"prompt_embeds": [1.0]}, "prompt_embeds"),
        ({"extra_args": {"latents": [1.0]}}, "extra_args"),
        ({"extra_args": {"nonsense": 1}}, None),
        ({"extra_args": {"width": 5}}, "extra_args"),
        ({"generator": 5}, "generator"),
        ({"output_type": "latent"}, "output_type"),
        ({"pil_image": "/etc/passwd"}, "pil_image"),
        ({"image": "/etc/passwd"}, "image"),
        ({"image": "http://127.0.0.1/x.png"}, "image"),
        ({"image": "data:image/png,xyz"}, "image"),
        ({"image": "data:image/png;base64,!!!"}, "image"),
        ({"image": "data:image/png;base64,AAAA"}, "image"),
        ({"image": ["data:image/png;base64,AAAA"] * 17}, "image"),
        ({"priority": 11}, "priority"),
    ],
)
def test_mistakes_are_named(images: Served, fields: dict[str, Any], param: str | None) -> None:
    error = error_of(images, NOW, {"prompt": "a cat", **fields}, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert next(iter(fields)) in error["message"] or param is None


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": "0"},
        {"seconds": "1e9"},
        {"seconds": 10**9},
        {"seconds": -1},
        {"num_frames": 1001},
        {"fps": 0},
        {"fps": 1000},
        {"response_format": "url"},
        {"input_reference": {"file_id": "file-1"}},
    ],
)
def test_mistakes_of_videos_are_named(videos: Served, fields: dict[str, Any]) -> None:
    assert error_of(videos, "/v1/videos", {"prompt": "a cat", **fields}, 400)["param"] == next(iter(fields))


def test_unknown_fields_name_the_nearest(images: Served) -> None:
    error = error_of(images, NOW, {"prompt": "a cat", "num_inference_step": 3}, 400)
    assert error["message"] == "there is no field 'num_inference_step' (did you mean 'num_inference_steps'?)"
    assert error["code"] == "unknown_field"


@pytest.mark.parametrize(
    ("data", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"prompt": "x", "seed": 1e999}', "application/json", 400),
        (b'{"prompt": "x", "guidance_scale": NaN}', "application/json", 400),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "application/json", 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b"x", "text/plain", 415),
        (b"prompt=x", "application/x-www-form-urlencoded", 415),
        (b"--x\r\n", "multipart/form-data", 400),
        (b"nonsense", "multipart/form-data; boundary=x", 400),
    ],
)
def test_bodies_that_are_none(images: Served, data: bytes, kind: str, status: int) -> None:
    error_of(images, NOW, data, status, {"Content-Type": kind})


def test_forms_are_checked_like_json(videos: Served) -> None:
    def ask(**fields: Any) -> Any:
        data, kind = form({"prompt": "a cat", **fields})
        return videos.call("POST", "/v1/videos", data, {"Content-Type": kind})[:2]

    status, job = ask(num_frames="9", guidance_scale="2", size="64x32", quality="auto", user="")
    assert status == 200
    assert job["parameters"]["num_frames"] == 9
    assert ask(num_frames="nine")[1]["error"]["param"] == "num_frames"
    assert ask(num_frame="9")[1]["error"]["param"] == "num_frame"
    assert ask(quality="hd")[1]["error"]["param"] == "quality"
    assert ask(mask=("m.png", picture()))[1]["error"]["param"] == "mask"
    assert ask(other=("m.png", picture()))[1]["error"]["code"] == "unknown_field"
    assert ask(**{"extra_args[attention_kwargs]": "{}"})[0] == 400  # it has a field of its own


def test_other_models_and_kinds(images: Served, videos: Served) -> None:
    assert error_of(images, NOW, {"prompt": "x", "model": "sora"}, 404)["code"] == "model_not_found"
    assert "POST /v1/videos" in error_of(videos, NOW, {"prompt": "x"}, 400)["message"]
    assert error_of(images, "/v1/images/edits", {"prompt": "x"}, 400)["param"] == "image"


@pytest.mark.parametrize("path", ["/", "/v1/images", "/v1/videos"])
def test_ids_that_are_none(images: Served, path: str) -> None:
    for job_id in ("image_" + "0" * 32, "..%2f..%2fjobs.sqlite", "%00", "image_" + "0" * 31 + "%0a", "a" * 3000):
        status, answer, _ = images.call("GET", f"{path.rstrip('/')}/{job_id}")
        assert status == 404
        assert answer["error"]["type"] == "invalid_request_error"


def test_methods_that_are_not_there(images: Served) -> None:
    status, answer, headers = images.call("PUT", "/v1/images/generations", {})
    assert (status, headers["allow"]) == (405, "POST")
    assert answer["error"]["message"]


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


def test_seeds_are_drawn_and_told(images: Served) -> None:
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
    assert failed["error"] == {"code": "ranks_died", "message": "a rank died"}
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


def test_about_the_server(images: Served, videos: Served) -> None:
    _, server, _ = videos.call("GET", "/v1/server")
    assert (server["model"], server["kind"], server["state"]) == ("tiny/wan2.2-ti2v", "video", "ready")
    assert (server["takes_image"], server["needs_image"], server["default_fps"]) == (True, False, 24.0)
    assert {"prompt", "num_frames", "guidance_scale", "seed", "fps"} <= set(server["parameters"])
    assert not {"latents", "generator", "prompt_embeds"} & set(server["parameters"])
    assert server["defaults"]["guidance_scale"] == 5.0
    assert server["defaults"]["width"] == 192  # of the tiny model, not of its class
    assert server["notes"] == ["a note of the ranks"]
    assert images.call("GET", "/health")[1] == {"status": "ok"}
    assert images.call("GET", "/ready")[1]["ranks"][0]["state"] == "ready"


def test_metrics(images: Served) -> None:
    status, text, headers = images.call("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert b"shardit_fake_metric 1.0" in text
    images.call("GET", "/metrics")
    assert (
        b'shardit_http_requests_total{method="GET",route="/metrics",status="200"}' in images.call("GET", "/metrics")[1]
    )


def test_the_page_has_a_strict_policy(images: Served) -> None:
    status, _, headers = images.call("GET", "/")
    if status == 200:  # the page is data of the package, not of this process
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]
    assert images.call("GET", "/page.html")[0] == 404


def test_the_process_is_small(images: Served) -> None:
    folder = Path(f"/proc/{images.process.pid}")
    if not folder.is_dir():
        pytest.skip("this system has no /proc")
    assert "torch" not in (folder / "maps").read_text()
    peak = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 150 * 1024


def test_it_is_up_soon(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        times = Path(f"/proc/{served.process.pid}/stat").read_text().rpartition(")")[2].split()
        assert (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK") < 3  # a second, had it a core to itself


def test_while_ranks_load(tmp_path: Path) -> None:
    with serving(tmp_path, VIDEO, state="loading") as served:
        status, ready, headers = served.call("GET", "/ready")
        assert (status, ready["state"]) == (503, "loading")
        assert int(headers["retry-after"]) >= 1
        status, answer, headers = served.call("POST", "/v1/videos", {"prompt": "a cat"})
        assert (status, answer["error"]["code"]) == (503, "loading")
        assert "retry-after" in headers
        assert served.call("GET", "/v1/server")[1]["kind"] is None
        served.supervisor.tell(Ranks("ready", info=VIDEO))
        served.wait_for("/ready")
        assert served.call("POST", "/v1/videos", {"prompt": "a cat"})[0] == 200
    with serving(tmp_path, VIDEO, state="restarting") as served:  # what it knew, it knows still
        assert served.call("GET", "/ready")[0] == 503
        assert served.call("POST", "/v1/videos", {"prompt": "a cat"})[0] == 200


def test_the_queue_is_bounded(tmp_path: Path) -> None:
    with serving(tmp_path, queue_size=2) as served:
        served.supervisor.held = True
        accepted = [served.call("POST", NOW, {"prompt": "a cat"}, LATER) for _ in range(2)]
        assert [status for status, _, _ in accepted] == [202, 202]
        assert accepted[1][1]["position"] == 1
        status, answer, headers = served.call("POST", NOW, {"prompt": "a cat"}, LATER)
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["retry-after"]) >= 1


def test_what_will_not_fit_is_refused_before(tmp_path: Path) -> None:
    memory = {"limit": 2**30, "points": [[1000, 2**29], [10_000, 2**29 + 2**20]], "failed": 2_000_000}
    with serving(tmp_path, VIDEO, memory=memory) as served:
        error = error_of(served, "/v1/videos", {"prompt": "x", "size": "512x512", "num_frames": 9}, 400)
        assert error["param"] == "size"
        assert served.call("POST", "/v1/videos", {"prompt": "x", "size": "64x64", "num_frames": 9})[0] == 200


def test_sigterm_tells_who_waits(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(served.call("POST", NOW, {"prompt": "slow"})))
        asking.start()
        open_job(served)
        served.process.terminate()
        assert served.process.wait(WAIT_S) in (0, -signal.SIGTERM)
        asking.join(WAIT_S)
        assert (answers[0][0], answers[0][1]["error"]["code"]) == (503, "stopping")


def test_after_a_kill_jobs_without_a_client_are_cancelled(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.supervisor.held = True
        _, kept, _ = served.call("POST", NOW, {"prompt": "kept"}, LATER)
        asking = threading.Thread(target=ignoring_errors(lambda: served.call("POST", NOW, {"prompt": "waits"})))
        asking.start()
        waiting = open_job(served, "waits")
        served.process.kill()
        served.process.wait(WAIT_S)
        asking.join(WAIT_S)
    with serving(tmp_path, held=True) as served:
        served.supervisor.held = False
        served.until(f"/v1/images/{kept['id']}", "completed")
        assert served.call("GET", f"/v1/images/{waiting}")[1]["status"] == "cancelled"


def test_without_its_supervisor_it_ends(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.supervisor.channel.socket.shutdown(socket.SHUT_RDWR)
        assert served.process.wait(WAIT_S) == 1


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
