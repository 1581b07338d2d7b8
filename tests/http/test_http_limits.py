"""Requests above a limit are refused before anything is decoded, for explicit values and for defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.server import estimate
from shardit.server.estimate import MemorySample
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.submit.resolve import check_limits, pipeline_names
from shardit.server.options import RequestLimits
from tests.support.http_calls import NOW, error_of
from tests.support.http_fake import VIDEO, Served, form, picture, serving

WAN = VIDEO.signature
SMALL = RequestLimits(pixels=512 * 512, frames=17, steps=10)
FITS = {"width": 512, "height": 512, "num_frames": 17, "num_inference_steps": 10}
FURTHER = PipelineSignature("SomePipeline", ("prompt", "width", "prior_num_inference_steps", "base_num_frames"))


@pytest.mark.parametrize(
    ("given", "takes", "param"),
    [
        ({name: value for name, value in FITS.items() if name not in ("width", "height")}, WAN, "size"),
        ({name: value for name, value in FITS.items() if name != "height"}, WAN, None),
        ({**FITS, "height": 513}, WAN, "size"),
        ({name: value for name, value in FITS.items() if name != "num_frames"}, WAN, "num_frames"),
        ({name: value for name, value in FITS.items() if name != "num_inference_steps"}, WAN, "num_inference_steps"),
        ({**FITS, "num_inference_steps": None, "sigmas": [1.0] * 10}, WAN, None),
        ({**FITS, "sigmas": [1.0] * 11}, WAN, "sigmas"),
        ({"width": 257}, FURTHER, "size"),
        ({"width": 256}, FURTHER, None),
        ({"prior_num_inference_steps": 10**9}, FURTHER, "prior_num_inference_steps"),
        ({"extra_args": {"prior_num_inference_steps": 10**9}}, FURTHER, "prior_num_inference_steps"),
        ({"extra_args": {"pyramid_num_inference_steps_list": [1, [11]]}}, FURTHER, "pyramid_num_inference_steps_list"),
        ({"base_num_frames": 18}, FURTHER, "base_num_frames"),
        ({"max_new_tokens": 4097}, FURTHER, "max_new_tokens"),
        ({"prior_timesteps": [999, 0], "max_timesteps": 999, "enforce_inference_steps": True}, FURTHER, None),
        ({"extra_args": {"width": "wide", "sigmas": 5, "base_num_frames": "many"}}, FURTHER, None),  # refused elsewhere
    ],
)
def test_limits(given: dict[str, Any], takes: PipelineSignature, param: str | None) -> None:
    given = {name: value for name, value in given.items() if value is not None}
    if param is None:
        check_limits(given, takes, SMALL)
        return
    with pytest.raises(ApiError, match=param) as raised:
        check_limits(given, takes, SMALL)
    assert (raised.value.status, raised.value.code, raised.value.param) == (400, "too_large", param)


def test_defaults_of_the_pipeline_are_within_the_limits(tmp_path: Path) -> None:
    with serving(tmp_path, VIDEO, model="a/model", limits=SMALL) as served:
        error = error_of(served, "/v1/videos", {"prompt": "a cat"}, 400)
        assert (error["param"], error["code"]) == ("size", "too_large")
        status, job, _ = served.call("POST", "/v1/videos", {"prompt": "a cat", **FITS})
        assert (status, job["size"]) == (200, "512x512")


def test_long_numbers_name_the_limit(images: Served) -> None:
    error = error_of(images, "/v1/images/generations", {"prompt": "a cat", "size": f"{'9' * 20}x64"}, 400)
    assert (error["param"], error["code"]) == ("size", "too_large")


def test_files_hold_the_result(images: Served) -> None:
    for format_, size, most in (("webp", "16384x16", 16383), ("jpeg", "16x65504", 65500)):
        fields = {"prompt": "a cat", "size": size, "output_format": format_}
        error = error_of(images, "/v1/images/generations", fields, 400)
        assert (error["param"], error["code"]) == ("size", "too_large")
        assert f"at most {most} pixels" in error["message"]


def test_pictures_are_decoded_last(images: Served) -> None:
    """A damaged picture is not noticed where something else is wrong, and of two the header of the second is first."""
    damaged = picture()[:-40]
    for fields, param in (
        ({"size": "9999x9999"}, "size"),
        ({"num_inference_steps": 10**9}, "num_inference_steps"),
        ({"image": [("a.png", damaged), ("b.png", picture((5000, 5000)))]}, "image"),
    ):
        data, kind = form({"prompt": "a cat", "image": ("a.png", damaged), **fields})
        error = error_of(images, "/v1/images/edits", data, 400, {"Content-Type": kind})
        assert error["param"] == param
        assert "5000x5000" in error["message"] or param != "image"


def test_repeated_key_returns_its_job_after_new_measurements(tmp_path: Path) -> None:
    body, key = {"prompt": "a cat", "size": "64x64"}, {"Idempotency-Key": "one"}
    with serving(tmp_path) as served:
        status, first, _ = served.call("POST", NOW, body, {**key, "Prefer": "respond-async"})
        assert status == 202
        too_much = estimate.learn_memory(None, MemorySample(64 * 64, 0, out_of_memory=True))
        served.store.remember(estimate.MEMORY, too_much)
        assert "will not fit" in error_of(served, NOW, body, 400)["message"]
        _, again, _ = served.call("POST", NOW, body, {**key, "Prefer": "respond-async"})
        assert again["id"] == first["id"]


def test_no_argument_names_a_file_of_this_machine() -> None:
    names = ("audio_file", "raw_path", "url", "profile", "mask_image", "steps_per_url_list")
    assert pipeline_names(ModelInfo(PipelineSignature("P", ("prompt", *names)))) == ["prompt", "profile", "seed"]


def test_no_argument_is_listed_that_only_a_tensor_fits() -> None:
    takes = PipelineSignature("P", ("prompt", "waves", "rate"), tensors=("waves",))
    assert pipeline_names(ModelInfo(takes)) == ["prompt", "rate", "seed"]
