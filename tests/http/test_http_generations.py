"""Models that make neither pictures nor videos, over HTTP."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardit.diffusion.output.output import Output
from shardit.server.supervisor.result_files import write_results
from tests.support.http_fake import Served


def test_a_job_of_sound(sounds: Served) -> None:
    assert sounds.call("GET", "/v1/server")[1]["kind"] == "generation"
    asked = {"prompt": "a drum", "n": 2, "seed": 5, "audio_end_in_s": 1.5}
    status, job, headers = sounds.call("POST", "/v1/generations", asked)
    assert (status, job["object"]) == (200, "generation")
    assert headers["location"] == f"/v1/generations/{job['id']}"
    done = sounds.until(headers["location"], "completed")
    assert [file["name"] for file in done["data"]] == ["output-0.wav", "output-1.wav"]
    assert done["parameters"]["audio_end_in_s"] == 1.5
    status, content, headers = sounds.call("GET", done["data"][1]["url"].removeprefix(sounds.url))
    assert (status, headers["content-type"]) == (200, "audio/wav")
    with wave.open(io.BytesIO(content)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getnframes()) == (16000, 1, 160)
    status, content, headers = sounds.call("POST", "/v1/generations/sync", {"prompt": "a drum"})
    assert (status, content[:4], headers["content-type"]) == (200, b"RIFF", "audio/wav")
    assert [job["n"] for job in sounds.call("GET", "/v1/generations")[1]["data"]] == [1, 2]
    status, gone, _ = sounds.call("DELETE", f"/v1/generations/{job['id']}")
    assert (status, gone["object"]) == (200, "generation.deleted")


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/videos"])
def test_other_routes_name_the_right_one(sounds: Served, path: str) -> None:
    status, answer, _ = sounds.call("POST", path, {"prompt": "a drum"})
    assert (status, answer["error"]["code"]) == (400, "wrong_kind")
    assert answer["error"]["message"] == "this server makes audio; use POST /v1/generations"


def test_results_of_every_kind(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 16))

    def written(**made) -> tuple[list[str], dict]:
        return write_results(Output(prompt="a", seed=1, **made), tmp_path, {})

    sound = {"audio": np.zeros((1, 2, 16000), np.float32), "sample_rate": 16000}
    names, details = written(frames=[[picture] * 3], **sound, extra={"c2w": np.ones(3), "flags": [False]})
    assert (names, details["sample_rate"], details["num_frames"]) == (["output.mp4"], 16000, 3)
    assert details["notes"] == ["not in the file: c2w"]
    assert written(texts=["a", "b"])[0] == ["output-0.txt", "output-1.txt"]
    assert written(extra={"image_embeds": np.ones((1, 4))})[0] == ["output.safetensors"]
    names, details = written(extra={"prediction": np.zeros((1, 16, 32, 1))})
    assert (names, details["width"], details["height"], details["notes"]) == (["output.png"], 32, 16, [])
