"""The API process itself: its information about the server, its size, its start and end, and failures of other
processes."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from shardit.server.messages import Ranks
from tests.support.http_calls import LATER, NOW, error_of, ignoring_errors, open_job
from tests.support.http_fake import VIDEO, WAIT_S, Served, serving


def test_about_the_server(images: Served, videos: Served) -> None:
    _, server, _ = videos.call("GET", "/v1/server")
    assert (server["model"], server["kind"], server["state"]) == ("tiny/wan2.2-ti2v", "video", "ready")
    assert (server["takes_image"], server["needs_image"], server["default_fps"]) == (True, False, 24.0)
    assert server["most_images"] == 1
    assert images.call("GET", "/v1/server")[1]["most_images"] == 16
    assert {"prompt", "num_frames", "guidance_scale", "seed", "fps"} <= set(server["parameters"])
    assert not {"latents", "generator", "prompt_embeds"} & set(server["parameters"])
    assert server["defaults"]["guidance_scale"] == 5.0
    assert server["defaults"]["width"] == 192  # of the tiny model, not of its class
    assert server["example_prompt"] == ""  # its weights are made up
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


def test_a_new_process_is_small_and_up_soon(tmp_path: Path) -> None:
    with serving(tmp_path, new=True) as served:
        folder = Path(f"/proc/{served.process.pid}")
        if not folder.is_dir():
            pytest.skip("this system has no /proc")
        assert "torch" not in (folder / "maps").read_text()
        peak = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM"))
        assert int(peak.split()[1]) < 150 * 1024
        times = (folder / "stat").read_text().rpartition(")")[2].split()
        assert (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK") < 3  # a second, had it a core to itself


def test_jobs_wait_while_the_model_is_loaded(tmp_path: Path) -> None:
    with serving(tmp_path, VIDEO, state="loading", held=True) as served:
        status, ready, headers = served.call("GET", "/ready")
        assert (status, ready["state"]) == (503, "loading")
        assert int(headers["retry-after"]) >= 1
        shown = served.call("GET", "/v1/server")[1]
        assert (shown["state"], shown["kind"], shown["takes_image"]) == ("loading", "video", True)
        assert error_of(served, "/v1/videos", {"prompt": "a cat", "steps": 3}, 400)["param"] == "steps"
        assert error_of(served, "/v1/images/generations", {"prompt": "a cat"}, 400)["code"] == "wrong_kind"
        status, job, _ = served.call("POST", "/v1/videos", {"prompt": "a cat", "seed": 1})
        assert (status, job["status"]) == (200, "queued")
        served.supervisor.tell(Ranks("ready", info=VIDEO))
        served.wait_for("/ready")
        served.supervisor.held = False
        assert served.until(f"/v1/videos/{job['id']}", "completed", "failed")["status"] == "completed"


def test_a_model_that_is_not_known_before_it_is_loaded(tmp_path: Path) -> None:
    with serving(tmp_path, VIDEO, state="loading", model="somebody/something") as served:
        status, answer, headers = served.call("POST", "/v1/videos", {"prompt": "a cat"})
        assert (status, answer["error"]["code"]) == (503, "loading")
        assert "retry-after" in headers
        assert served.call("GET", "/v1/server")[1]["kind"] is None
        served.supervisor.tell(Ranks("ready", info=VIDEO))
        served.wait_for("/ready")
        assert served.call("POST", "/v1/videos", {"prompt": "a cat"})[0] == 200
    with serving(tmp_path, VIDEO, state="restarting", model="somebody/something") as served:  # it is remembered
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


def test_requests_too_large_for_memory_are_refused_early(tmp_path: Path) -> None:
    memory = {"limit": 2**30, "points": [[1000, 2**29], [10_000, 2**29 + 2**20]], "failed": 2_000_000}
    with serving(tmp_path, VIDEO, memory=memory) as served:
        error = error_of(served, "/v1/videos", {"prompt": "x", "size": "512x512", "num_frames": 9}, 400)
        assert error["param"] == "size"
        assert served.call("POST", "/v1/videos", {"prompt": "x", "size": "64x64", "num_frames": 9})[0] == 200


def test_sigterm_answers_waiting_clients(tmp_path: Path) -> None:
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
