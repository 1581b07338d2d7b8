"""Sizes that a pipeline refuses are refused before a job runs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.preflight.static_signature import static_signatures_of_model
from shardit.diffusion.preflight.static_sizes import static_sizes
from shardit.diffusion.request.advice import advice
from shardit.diffusion.request.build import build_requests
from shardit.diffusion.request.pipeline_signature import signature_of
from shardit.diffusion.request.size_multiples import least_sides, size_multiples
from shardit.engine.process.messages import SessionSpec
from shardit.engine.tasks.loaded_signature import loaded_signature
from shardit.errors import InputError
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.schema.fields import check_fields, field_models
from shardit.server.http.submit.resolve import arguments
from shardit.server.options import RequestLimits, ServeOptions
from tests.pipelines.entry import entries
from tests.support import brought


class PickyPipeline:
    """Checks in its call, as some do, and wants other multiples of the height than of the width."""

    components: dict = {}

    def __call__(self, prompt=None, height=None, width=None, num_frames=9):
        if height % 64 or width % 8:
            raise ValueError("odd size")
        self.encode_prompt(prompt)

    def encode_prompt(self, prompt):
        raise AssertionError("nothing is to run")


class RoundingPipeline(PickyPipeline):
    def __call__(self, prompt=None, height=None, width=None, latents=None):
        self.encode_prompt(prompt)


TAKES = dataclasses.replace(signature_of(PickyPipeline), multiples={"height": 64, "width": 8})
OPTIONS = ServeOptions(model="m", data_dir=Path("data"), limits=RequestLimits(pixels=1000 * 1000))


def test_multiples_are_found_by_asking():
    assert size_multiples(PickyPipeline()) == {"height": 64, "width": 8}
    assert size_multiples(RoundingPipeline()) == {}
    assert size_multiples(object()) == {}


@pytest.mark.parametrize(
    ("name", "multiple"), [("sd3.5", 16), ("z-image", 16), ("wan2.2-i2v", 16), ("qwen-image", None)]
)
def test_multiples_of_real_pipelines(name, multiple):

    found = size_multiples(brought.pipeline(name))
    assert found == ({} if multiple is None else {"height": multiple, "width": multiple})


@pytest.mark.parametrize(
    ("name", "multiple"), [("ErnieImagePipeline", 4), ("StableDiffusion3ControlNetPipeline", 8), ("FluxPipeline", None)]
)
def test_multiples_of_pipelines_that_cannot_be_tried(name, multiple):
    pipe = entries()[name].build()
    found = loaded_signature(pipe, SessionSpec("tiny/flux", DiffusionParallelConfig()), {})
    assert found.multiples == ({} if multiple is None else {"height": multiple, "width": multiple})


@pytest.mark.parametrize(("name", "before"), [("StableDiffusionPipeline", 1), ("StableDiffusionXLPipeline", 2)])
def test_what_the_parts_of_a_pipeline_do_not_take(name, before, tmp_path):
    """`clip_skip` counts the states of the text encoders from the end; some schedulers take no list of noise levels."""
    pipe = entries()[name].build()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    found = loaded_signature(pipe, SessionSpec("tiny/flux", DiffusionParallelConfig()), {})
    most = pipe.text_encoder.config.num_hidden_layers + 1 - before
    call = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with contextlib.suppress(AttributeError):  # the tested transformers has no `text_model`
        pipe.encode_prompt("a", **call, clip_skip=most)
    with pytest.raises(IndexError):
        pipe.encode_prompt("a", **call, clip_skip=most + 1)
    pipe.save_pretrained(tmp_path)
    for takes in (found, static_signatures_of_model(tmp_path)[0]):
        assert takes.limit_problem("clip_skip", most) is None
        assert takes.limit_problem("clip_skip", most + 1) == f"clip_skip must be at most {most}, got {most + 1}"
    assert found.limit_problem("sigmas", [1.0]).startswith("sigmas: DDIMScheduler takes none; leave it out")
    with pytest.raises(ApiError, match="timesteps: DDIMScheduler takes none") as raised:
        arguments({"prompt": "a", "timesteps": [1]}, found, ServeOptions("m", tmp_path))
    assert raised.value.param == "timesteps"
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert not loaded_signature(pipe, SessionSpec("tiny/flux", DiffusionParallelConfig()), {}).refused


@pytest.mark.parametrize(("name", "least"), [("qwen-image", 16), ("flux", 16), ("wan2.2-t2v", 8)])
def test_the_least_sides_of_real_pipelines(name, least):

    assert least_sides(brought.pipeline(name)) == {"height": least, "width": least}


def test_a_size_that_is_too_small():
    takes = dataclasses.replace(signature_of(RoundingPipeline), least={"height": 16, "width": 16})
    rest = {"prompt": None, "negative_prompt": None, "pil_image": None, "takes": takes}
    with pytest.raises(InputError, match="width must be at least 16, got 8"):
        build_requests("a", None, overrides={"height": 16, "width": 8}, **rest)
    assert build_requests("a", None, overrides={"height": 16, "width": 17}, **rest)
    for size, side in (("8x16", "width"), ("16x1", "height")):
        with pytest.raises(ApiError, match=f"{side} must be at least 16") as caught:
            arguments({"prompt": "a", "size": size}, takes, OPTIONS)
        assert caught.value.param == "size"


OF_TOO_SMALL = (
    RuntimeError(
        "Calculated padded input size per channel: (1 x 3). Kernel size: (3 x 3). Kernel size can't be greater"
    ),
    RuntimeError("cannot reshape tensor of 0 elements into shape [1, 0, -1]"),
    RuntimeError("Input and output sizes should be greater than 0, but got input (H: 0, W: 8)"),
    RuntimeError("Expected 3D or 4D tensor with optional 0 dim batch size for input, but got: [1, 4, 0, 8]"),
    IndexError("index 0 is out of bounds for dimension 0 with size 0"),
    ZeroDivisionError("integer modulo by zero"),
)
OF_OTHER_CAUSES = (
    IndexError("tuple index out of range"),
    RuntimeError("Sizes of tensors must match except in dimension 1. Expected size 2 but got size 4"),
    RuntimeError("Given groups=1, weight of size [8, 3, 3, 3], expected input[1, 1, 34, 34] to have 3 channels"),
    ValueError("no"),
)


@pytest.mark.parametrize("error", [*OF_TOO_SMALL, *OF_OTHER_CAUSES], ids=str)
def test_an_error_at_a_small_size_says_that_it_may_be_too_small(error):
    takes = signature_of(RoundingPipeline)
    rest = {"prompt": None, "negative_prompt": None, "pil_image": None, "takes": takes}
    [request] = build_requests("a", None, overrides={"height": 32, "width": 512}, **rest)
    assert ("too small for the model (height 32, width 512)" in advice(request, error)) is (error in OF_TOO_SMALL)
    [own] = build_requests("a", None, overrides={"height": 32, "width": 512, "latents": torch.ones(1)}, **rest)
    assert "too small" not in advice(own, error)
    [request] = build_requests("a", None, overrides={"height": 512, "width": 512}, **rest)
    assert "too small" not in advice(request, error) or "Kernel" in str(error)


def test_a_pipeline_of_pipelines_is_not_asked():
    class Inner(DiffusionPipeline):
        def __call__(self, prompt=None, height=None, width=None):
            raise AssertionError("nothing is to run")

    class Combined(PickyPipeline):
        def __init__(self):
            self.inner = Inner()

        def __call__(self, prompt=None, height=None, width=None):
            self.inner(prompt, height, width)

    assert size_multiples(Combined()) == {}


def test_a_request_of_another_size():
    rest = {"prompt": None, "negative_prompt": None, "pil_image": None, "takes": TAKES}
    with pytest.raises(InputError, match="height must be a multiple of 64, got 97; use 64 or 128"):
        build_requests("a", None, overrides={"height": 97, "width": 64}, **rest)
    assert build_requests("a", None, overrides={"height": 128, "width": 72}, **rest)
    assert build_requests("a", None, overrides={"height": np.int64(128), "width": 72}, **rest)
    with pytest.raises(InputError, match="height must be a multiple of 64, got 97; use 64 or 128"):
        build_requests("a", None, overrides={"height": np.int64(97), "width": 64}, **rest)
    assert dataclasses.replace(TAKES, most={"n": 8}).limit_problem("n", np.int32(9)) == "n must be at most 8, got 9"


@pytest.mark.parametrize(
    ("given", "param", "text"),
    [
        ({"size": "97x64"}, "size", "width must be a multiple of 8, got 97; use 96 or 104"),
        ({"width": 96, "height": 65}, "height", "height must be a multiple of 64, got 65; use 64 or 128"),
        ({"size": "100000x100000"}, "size", "size is 10000000000 pixels, the limit is 1000000"),
    ],
)
def test_a_job_of_another_size(given, param, text):
    with pytest.raises(ApiError) as caught:
        arguments({"prompt": "a", **given}, TAKES, OPTIONS)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert text in str(caught.value)


def test_refused_sizes_are_not_suggested():
    model = field_models(RequestLimits()).image
    for wrong, right in (("num_frame", "num_frames"), ("backgrund", None), ("strenght", None), ("sizes", "size")):
        with pytest.raises(ApiError) as caught:
            check_fields(model, {"prompt": "a", wrong: 1}, ["num_frames", "height"])
        assert ("did you mean" in str(caught.value)) == (right is not None), wrong
        assert right is None or repr(right) in str(caught.value)


@pytest.mark.parametrize(("name", "multiple"), [("PixArtSigmaPipeline", None), ("StableDiffusionPipeline", 8)])
def test_sizes_that_a_pipeline_rounds_first_are_not_refused_before_it_is_loaded(name, multiple):
    torch.manual_seed(0)
    pipe = entries()[name].build()
    configs = {key: dict(part.config) for key, part in pipe.components.items() if isinstance(part, ConfigMixin)}
    found = static_sizes(name, inspect.signature(type(pipe).__call__).parameters, configs)["multiples"]
    assert found == size_multiples(pipe) == ({} if multiple is None else {"height": multiple, "width": multiple})
