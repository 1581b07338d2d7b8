"""The real openai package against a real server on two ranks, and the server's metrics afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shardit.models import tiny
from tests.support.real_omni import same
from tests.support.real_server import WAIT_S, RealServer, expected, pictures, real_server

STAGES = ("--pipeline-parallel-size", "2", "--api-key", "a-secret")
STEPS = 3


def client_of(server: RealServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="a-secret", timeout=WAIT_S, max_retries=0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with real_server("wan2.2-t2v", tmp_path_factory.mktemp("videos") / "data", *STAGES) as server:
        yield server


@pytest.fixture(scope="module")
def video(videos: RealServer) -> openai.types.Video:
    client = client_of(videos)
    own = {**tiny.defaults("wan2.2-t2v"), "seed": 5, "num_inference_steps": STEPS}
    own["fps"] = 24  # as `expected` writes its file
    (model,) = client.models.list().data
    video = client.videos.create(model=model.id, prompt="a cat runs", extra_body=own)
    return client.videos.poll(video.id, poll_interval_ms=50)


def test_a_video(videos: RealServer, video: openai.types.Video) -> None:
    client = client_of(videos)
    assert video.status == "completed"
    made = pictures(client.videos.download_content(video.id).read())
    assert same(expected("wan2.2-t2v", 5, "a cat runs", (("num_inference_steps", STEPS),)), made)
    assert [one.id for one in client.videos.list().data] == [video.id]


@pytest.mark.usefixtures("video")
def test_metrics_of_that_video(videos: RealServer) -> None:
    found = samples(videos)
    assert found["shardit_jobs_total", "completed"] == 1
    assert found["shardit_job_seconds_count", "completed"] == 1
    assert found["shardit_step_seconds_count", ""] == STEPS
    phases = [found["shardit_phase_seconds_sum", phase] for phase in ("encode", "denoise", "decode")]
    assert min(phases) > 0
    assert sum(phases) <= found["shardit_job_seconds_sum", "completed"]
    assert found["shardit_queue_jobs", ""] == found["shardit_in_flight_jobs", ""] == found["shardit_restarts_total", ""]
    assert found["shardit_restarts_total", ""] == 0
    for rank in ("0", "1"):
        assert 0 <= found["shardit_rank_idle_share", rank] < 1
        assert found["shardit_rank_peak_bytes", rank] > 2**20
    videos.kill("rank 1")
    videos.wait(lambda: samples(videos)["shardit_restarts_total", ""] == 1, "the restart is counted")


def samples(server: RealServer) -> dict[tuple[str, str], float]:
    """By name and the value of the only label."""
    text = client_of(server).with_options().get("../metrics", cast_to=str)
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
