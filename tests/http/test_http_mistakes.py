"""Errors name the mistake in a request: fields, bodies, forms, addresses, methods."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardit.cli import main
from shardit.diffusion.preflight import preflight
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.server.http.answers.waiting import check_completed
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.schema.job_errors import job_error
from shardit.server.jobs.job import Job
from tests.support.http_calls import NOW, error_of
from tests.support.http_fake import VIDEO, Served, form, picture, serving


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
        ({"seed": -2}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"prompt": "\ud800"}, None),
        ({"max_sequence_length": 10**6}, "max_sequence_length"),
        ({"width": 10**9, "height": 1}, "width"),
        ({"quality": "hd"}, "quality"),
        ({"quality": "high"}, "quality"),
        ({"user": 5}, "user"),
        ({"user": "x" * 513}, "user"),
        ({"style": "vivid"}, "style"),
        ({"moderation": "none"}, "moderation"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression"),
        ({"output_compression": 51, "output_format": "png"}, "output_compression"),
        ({"background": "transparent"}, "background"),
        ({"output_compression": 50}, "output_compression"),
        ({"stream": True}, "stream"),
        ({"stream": 0}, "stream"),
        ({"response_format": "path"}, "response_format"),
        ({"promt": "x"}, "promt"),
        ({"num_frames": 9}, "num_frames"),
        ({"fps": 8}, "fps"),
        ({"strength": 0.5}, "strength"),
        ({"prompt_embeds": [1.0]}, "prompt_embeds"),
        ({"extra_args": {"latents": [1.0]}}, "extra_args"),
        ({"extra_args": {"nonsense": 1}}, "extra_args"),
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
        {"fps": 1001},
        {"seconds": "1", "num_frames": 26},
        {"response_format": "url"},
        {"input_reference": {"file_id": "file-1"}},
    ],
)
def test_mistakes_of_videos_are_named(videos: Served, fields: dict[str, Any]) -> None:
    assert error_of(videos, "/v1/videos", {"prompt": "a cat", **fields}, 400)["param"] == next(iter(fields))


@pytest.mark.parametrize(
    ("kind", "reason", "param"),
    [
        ("generation", "ValueError: audio length (100.0s) is too long: 'audio_end_in_s-start<=6'", "audio_end_in_s"),
        ("image", "RuntimeError: Kernel; perhaps the result is too small (height 16, width 16): ask for more", "size"),
        ("image", "ValueError: height must be > 0; perhaps image is too narrow (1x300): give another", "image"),
        (
            "video",
            "ValueError: height must be > 0; perhaps image is too narrow (1x300): give another",
            "input_reference",
        ),
        ("image", "ValueError: `height` must be larger", "size"),
        ("image", "ValueError: `height` and `strength` do not go together", None),
        ("image", "RuntimeError: the height of the image is odd", None),
        ("image", "RuntimeError: out of memory", None),
    ],
)
def test_the_field_that_a_failed_job_names(kind: Any, reason: str, param: str | None) -> None:
    asked = {"prompt": "a", "height": 16, "width": 16, "extra_args": {"audio_end_in_s": 100.0, "strength": 0.5}}
    error = {"code": "generation_failed", "message": reason}
    view = {"image_field": "input_reference" if kind == "video" else "image"}
    job = Job(1, "job_1", kind, "failed", asked, 1, view, 0.0, 0.0, inputs=("input-0.png",), error=error)
    with pytest.raises(ApiError) as caught:
        check_completed(job)
    assert (caught.value.status, caught.value.param) == (400, param)
    shown = job_error(job)
    assert shown is not None
    assert shown.param == param  # as answers of GET and events have it
    with pytest.raises(ApiError) as caught:
        check_completed(dataclasses.replace(job, error={**error, "code": "storage"}))
    assert (caught.value.status, caught.value.param) == (500, None)


def test_an_empty_text_is_no_picture(videos: Served) -> None:
    for name in ("image", "input_reference"):
        error = error_of(videos, "/v1/videos", {"prompt": "a cat", name: ""}, 400)
        assert (error["param"], "must be a data: URL" in error["message"]) == (name, True)
        assert videos.call("POST", "/v1/videos", {"prompt": "a cat", name: []})[0] == 200
        data, kind = form({"prompt": "a cat", name: ""})  # as form libraries send null
        assert videos.call("POST", "/v1/videos", data, {"Content-Type": kind})[0] == 200


def test_shapes_are_described_in_words(images: Served, videos: Served) -> None:
    error = error_of(images, NOW, {"prompt": "a cat", "size": "64 x 64"}, 400)
    assert error["message"] == 'size must be WIDTHxHEIGHT in pixels, as in "1280x704", or "auto", got \'64 x 64\''
    error = error_of(videos, "/v1/videos", {"prompt": "a cat", "seconds": "4s"}, 400)
    assert error["message"] == "seconds must be a number above 0, as in \"4\", got '4s'"
    for seconds in ("100000", 100000, 1e308):
        error = error_of(videos, "/v1/videos", {"prompt": "a cat", "seconds": seconds}, 400)
        assert "seconds must be more than 0 and at most " in error["message"]
    error = error_of(videos, "/v1/videos", {"prompt": "a cat", "input_reference": {"file_id": "file-1"}}, 400)
    assert "an upload, a data: URL" in error["message"]


def test_pictures_that_the_model_does_not_take(tmp_path: Path) -> None:
    text_only = dataclasses.replace(VIDEO, signature_with_image=None)
    data, kind = form({"prompt": "a cat", "input_reference": ("a.png", picture())})
    with serving(tmp_path / "none", text_only, model="a/model") as served:
        error = error_of(served, "/v1/videos", data, 400, {"Content-Type": kind})
        assert (error["param"], "takes no image" in error["message"]) == ("input_reference", True)
    plain = ModelInfo(PipelineSignature("FluxPipeline", ("prompt",)))
    with serving(tmp_path / "plain", plain, model="a/model") as served:
        error = error_of(served, "/v1/images/edits", {"prompt": "a cat"}, 400)
        assert "takes no image; use a model that takes one, or POST /v1/images/generations" in error["message"]
    needs = ModelInfo(PipelineSignature("QwenImageEditPipeline", ("image", "prompt")))
    with serving(tmp_path / "needs", needs, model="a/model") as served:
        error = error_of(served, NOW, {"prompt": "a cat"}, 400)
        assert (error["param"], "give one in image (POST /v1/images/edits)" in error["message"]) == ("image", True)
        error = error_of(served, "/v1/videos", {"prompt": "a cat"}, 400)
        assert error["message"] == "this server makes images; use POST /v1/images/edits"
    data, kind = form({"prompt": "a cat", "image[]": [("a.png", picture())] * 2})
    with serving(tmp_path / "one", VIDEO) as served:
        error = error_of(served, "/v1/videos", data, 400, {"Content-Type": kind})
        assert (error["param"], error["code"]) == ("image", "too_many_images")


def test_unknown_query_parameters_are_named(images: Served) -> None:
    status, answer, _ = images.call("GET", "/v1/images?limit=1&cursor=x")
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "cursor", "unknown_parameter")
    text = "there is no query parameter 'cursor'; GET /v1/images takes after, limit, order"
    assert answer["error"]["message"] == text
    assert images.call("POST", f"{NOW}?n=2", {"prompt": "a cat"})[1]["error"]["param"] == "n"
    status, answer, _ = images.call("GET", "/v1/images?limit=1&limit=2")
    assert (status, answer["error"]["param"]) == (400, "limit")
    assert images.call("GET", "/v1/images?limit=1&order=asc")[0] == 200
    assert images.call("GET", "/health?x=1")[0] == 200  # probes may add one against caches
    assert images.call("GET", "/?x=1")[0] == 200  # the page


def test_encoded_bodies_and_long_numbers(images: Served) -> None:
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    error = error_of(images, NOW, gzip.compress(b'{"prompt": "a cat"}'), 415, packed)
    assert error["message"] == "the content encoding 'gzip' is not taken here; send the body as it is"
    long = b'{"prompt": "a cat", "seed": ' + b"1" * 5000 + b"}"
    error = error_of(images, NOW, long, 400, {"Content-Type": "application/json"})
    assert error["message"] == "the body is not valid JSON: it holds a number of 5000 digits"


def test_one_file_is_not_the_answer_for_several(videos: Served) -> None:
    error = error_of(videos, "/v1/videos/sync", {"prompt": "a cat", "n": 2}, 400)
    assert (error["param"], error["code"]) == ("n", "invalid_value")


def test_unknown_fields_name_the_nearest(images: Served) -> None:
    error = error_of(images, NOW, {"prompt": "a cat", "num_inference_step": 3}, 400)
    assert error["message"] == "there is no field 'num_inference_step' (did you mean 'num_inference_steps'?)"
    assert error["code"] == "unknown_field"
    for name in ("scheduler", "flow_shift", "lora"):
        error = error_of(images, NOW, {"prompt": "a cat", name: "x"}, 400)
        assert error["message"].startswith(f"there is no field {name!r}; it is chosen for all requests when the server")


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
def test_bodies_that_are_not_valid(images: Served, data: bytes, kind: str, status: int) -> None:
    error_of(images, NOW, data, status, {"Content-Type": kind})


def test_forms_are_checked_like_json(videos: Served) -> None:
    def ask(**fields: Any) -> Any:
        data, kind = form({"prompt": "a cat", **fields})
        return videos.call("POST", "/v1/videos", data, {"Content-Type": kind})[:2]

    status, job = ask(num_frames="9", guidance_scale="2", size="64x32", quality="auto", user="7")
    assert status == 200
    assert job["parameters"]["num_frames"] == 9
    assert ask(num_frames="nine")[1]["error"]["param"] == "num_frames"
    assert ask(num_frame="9")[1]["error"]["param"] == "num_frame"
    assert ask(quality="hd")[1]["error"]["param"] == "quality"
    assert ask(mask=("m.png", picture()))[1]["error"]["param"] == "mask"
    assert ask(other=("m.png", picture()))[1]["error"]["code"] == "unknown_field"
    message = ask(prompt=("m.png", picture()))[1]["error"]["message"]
    assert "'prompt' is no file field; files are: image, " in message
    assert "texts and numbers are sent as plain fields" in message
    assert ask(**{"extra_args[attention_kwargs]": "{}"})[0] == 400  # it has a field of its own


@pytest.mark.parametrize(("fields", "param"), [
    ({"guidance_scale": 1e308}, "guidance_scale"),
    ({"guidance_scale": 10**400}, "guidance_scale"),
    ({"guidance_scale_2": 1e39}, "guidance_scale_2"),
    ({"attention_kwargs": {"attention_mask": "x"}}, "attention_kwargs"),
    ({"attention_kwargs": {"ip_hidden_states": [[1.0]]}}, "attention_kwargs"),
    ({"attention_kwargs": {"scale": "big"}}, "attention_kwargs"),
    ({"joint_attention_kwargs": {"scale": []}}, "joint_attention_kwargs"),
])  # fmt: skip
def test_values_that_no_tensor_takes(videos: Served, fields: dict[str, Any], param: str) -> None:
    status, answer = videos.call("POST", "/v1/videos", {"prompt": "a cat", **fields})[:2]
    assert status == 400
    assert answer["error"]["param"] == param, answer
    assert param in answer["error"]["message"]


OWN = ModelInfo(
    signature=PipelineSignature(
        "PixArtSigmaPipeline",
        ("prompt", "num_inference_steps", "prior_num_inference_steps", "clean_caption", "use_en_prompt"),
        {"num_inference_steps": 4, "prior_num_inference_steps": 4, "clean_caption": True, "use_en_prompt": True},
        outputs=("images",),
    ),
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("own"), info=OWN) as served:
        yield served


@pytest.mark.parametrize("name", ["clean_caption", "use_en_prompt"])
@pytest.mark.parametrize("how", ["json", "form", "extra_args"])
def test_texts_for_bools(own: Served, name: str, how: str) -> None:
    """Whatever spelling a client's library has for a bool: any text would be true to the pipeline."""

    def ask(value: str) -> tuple[int, Any]:
        fields = {"extra_args": {name: value}} if how == "extra_args" else {name: value}
        data, kind = form({"prompt": "a cat", **fields})
        if how == "form":
            return own.call("POST", NOW, data, {"Content-Type": kind, "Prefer": "respond-async"})[:2]
        return own.call("POST", NOW, {"prompt": "a cat", **fields}, {"Prefer": "respond-async"})[:2]

    for value, meant in (("true", True), ("False", False), ("off", False), ("YES", True)):
        status, job = ask(value)
        assert status == 202, job
        held = job["parameters"]
        assert {**held, **held.get("extra_args", {})}[name] is meant
    status, answer = ask("maybe")
    assert (status, answer["error"]["param"]) == (400, name)


def test_texts_for_numbers_do_not_pass_the_limits(own: Served) -> None:
    for value in ("4", "100000", True):
        error = error_of(own, NOW, {"prompt": "a cat", "prior_num_inference_steps": value}, 400)
        assert error["param"] == "prior_num_inference_steps"
        assert "must be a number" in error["message"]


RATE = ModelInfo(
    signature=PipelineSignature(
        "LTX2Pipeline",
        ("prompt", "num_frames", "frame_rate", "num_inference_steps"),
        {"num_frames": 121, "frame_rate": 24.0, "num_inference_steps": 4},
        outputs=("frames",),
    ),
)


def test_the_models_own_name_for_fps(tmp_path: Path) -> None:
    with serving(tmp_path, info=RATE) as served:
        for rate in ({"fps": 8}, {"frame_rate": 8}, {"extra_args": {"frame_rate": 8}}):
            status, job, _ = served.call("POST", "/v1/videos", {"prompt": "a cat", "seconds": "1", **rate})
            assert status == 200, job
            assert (job["parameters"]["num_frames"], job["seconds"]) == (9, "1"), rate
        for name, rate in itertools.product(("fps", "frame_rate"), (0.01, 1000)):  # as a file may have
            status, job, _ = served.call("POST", "/v1/videos", {"prompt": "a cat", "num_frames": 9, name: rate})
            assert (status, job["fps"]) == (200, rate)
        for wrong in ("x", "8", 0, -1, 0.009, 1001, 1e9, True):
            error = error_of(served, "/v1/videos", {"prompt": "a cat", "frame_rate": wrong}, 400)
            assert error["param"] == "frame_rate"
            error = error_of(served, "/v1/videos", {"prompt": "a cat", "extra_args": {"frame_rate": wrong}}, 400)
            assert error["param"] == "frame_rate"
        data, kind = form({"prompt": "a cat", "frame_rate": "30fps"})
        status, answer, _ = served.call("POST", "/v1/videos", data, {"Content-Type": kind})
        assert (status, answer["error"]["param"]) == (400, "frame_rate")


def test_a_pipeline_without_a_prompt(tmp_path: Path) -> None:
    takes = PipelineSignature("DDPMPipeline", ("batch_size", "num_inference_steps"), outputs=("images",))
    with serving(tmp_path, info=ModelInfo(takes)) as served:
        for fields in ({}, {"prompt": ""}, {"prompt": None}):
            status, job, _ = served.call("POST", "/v1/images/generations", fields, {"Prefer": "respond-async"})
            assert (status, job["prompt"]) == (202, None), fields
        error = error_of(served, NOW, {"prompt": "a cat"}, 400)
        assert (error["param"], error["message"]) == ("prompt", "DDPMPipeline takes no prompt; leave it out")


def test_models_that_need_what_no_request_holds(tmp_path: Path) -> None:
    takes = PipelineSignature(
        "FakeInpaintPipeline", ("prompt", "image", "mask_image"), images=("mask_image",), outputs=("images",)
    )
    with serving(tmp_path, info=ModelInfo(takes)) as served:
        error = error_of(served, NOW, {"prompt": "a cat"}, 400)
        assert (error["param"], error["code"]) == ("model", "unsupported_model")
        assert "needs mask_image, which the server cannot take" in error["message"]


def test_such_models_are_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "check", lambda *_, **__: None)
        assert main(["serve", str(tmp_path), "--data-dir", str(tmp_path / "data")]) == 2
    assert "StableDiffusionInpaintPipeline needs mask_image, which the server" in capsys.readouterr().err


def test_forms_that_break_off_are_refused(images: Served) -> None:
    data, kind = form({"prompt": "a cat", "image": ("a.png", picture()), "size": "16x16"})
    for cut in (len(b"--limit--\r\n"), len(b"--limit--\r\n") + 2, 40, 100):
        error = error_of(images, "/v1/images/edits", data[:-cut], 400, {"Content-Type": kind})
        assert error["code"] == "invalid_form"


def test_forms_are_read_in_one_way_only(images: Served) -> None:
    data, kind = form({"prompt": "a cat", "size": "16x16"})
    error = error_of(images, NOW, data.replace(b"a cat", b"a \xe9 cat"), 400, {"Content-Type": kind})
    assert error["message"].endswith("prompt is not utf-8 text; send it as UTF-8.")
    coded = data.replace(b'"prompt"\r\n', b'"prompt"\r\nContent-Transfer-Encoding: base64\r\n')
    assert "base64" in error_of(images, NOW, coded, 400, {"Content-Type": kind})["message"]
    assert images.call("POST", NOW, data, {"Content-Type": kind})[0] == 200


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"prompt": "x", "prompt": "y"}', "prompt"),
        (b'{"prompt": "x", "extra_args": {"a": 1, "a": 1}}', "a"),
        (b'{"prompt": "x", "\\ud800": 1, "\\ud800": 2}', "?"),
    ],
)
def test_a_name_that_is_given_twice(images: Served, body: bytes, name: str) -> None:
    status, answer, _ = images.call("POST", NOW, body, {"Content-Type": "application/json"})
    assert (status, answer["error"]["param"]) == (400, name)
    assert f"{name!r} is given twice in one JSON object; give it once" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"stream": True}, "stream True has no meaning here; leave it out, or give null or false or 'auto'"),
        ({"partial_images": 2}, "or give null or 0 or 'auto'"),
        ({"sigmas": "abc"}, "sigmas must be a list of numbers, got 'abc'"),
        ({"timesteps": 5}, "timesteps must be a list of numbers, got 5"),
        ({"strength": "much"}, "strength must be a number, or a list of numbers, got 'much'"),
    ],
)
def test_errors_list_the_valid_values(images: Served, fields: dict[str, Any], text: str) -> None:
    status, answer, _ = images.call("POST", NOW, {"prompt": "x", **fields})
    assert status == 400
    assert text in answer["error"]["message"]


def test_other_models_and_kinds(images: Served, videos: Served) -> None:
    assert error_of(images, NOW, {"prompt": "x", "model": "sora"}, 404)["code"] == "model_not_found"
    assert "POST /v1/videos" in error_of(videos, NOW, {"prompt": "x"}, 400)["message"]
    assert error_of(images, "/v1/images/edits", {"prompt": "x"}, 400)["param"] == "image"


@pytest.mark.parametrize("path", ["/", "/v1/images", "/v1/videos"])
def test_unknown_ids(images: Served, path: str) -> None:
    for job_id in ("image_" + "0" * 32, "..%2f..%2fjobs.sqlite", "%00", "image_" + "0" * 31 + "%0a", "a" * 3000):
        status, answer, _ = images.call("GET", f"{path.rstrip('/')}/{job_id}")
        assert status == 404
        assert answer["error"]["type"] == "invalid_request_error"


def test_methods_that_are_not_there(images: Served) -> None:
    status, answer, headers = images.call("PUT", "/v1/images/generations", {})
    assert (status, headers["allow"]) == (405, "POST")
    assert answer["error"]["message"]
    paths = {"/v1/images/image_0": "DELETE, GET, HEAD", "/v1/images/image_0/events": "GET", "/": "GET, HEAD"}
    for path, methods in {**paths, "/v1/generations": "GET, HEAD, POST"}.items():
        status, _, headers = images.call("PUT", path, {})
        assert (status, headers["allow"]) == (405, methods), path
