"""Pictures and videos that a pipeline cannot run without: asked for by name, before it runs or when it fails."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import pytest
from PIL import Image

from shardit.diffusion.request.advice import advice
from shardit.diffusion.request.build import build_requests
from shardit.diffusion.request.pipeline_signature import signature_of
from shardit.errors import InputError
from shardit.server.unservable import unservable

PICTURE = Image.new("RGB", (64, 64))

NEEDED = {
    "FluxControlPipeline": {"control_image"},
    "FluxControlNetInpaintPipeline": {"control_image", "mask_image", "image"},
    "StableDiffusion3ControlNetInpaintingPipeline": {"control_image", "control_mask"},
    "StableDiffusionControlNetPipeline": {"image"},
    "StableDiffusionXLControlNetXSPipeline": {"image"},
    "StableDiffusionXLControlNetImg2ImgPipeline": {"image", "control_image"},
    "StableDiffusionXLControlNetUnionPipeline": {"control_image"},
    "StableDiffusionXLAdapterPipeline": {"image"},
    "AnimateDiffControlNetPipeline": {"conditioning_frames"},
    "AnimateDiffSparseControlNetPipeline": {"conditioning_frames"},
    "AnimateDiffVideoToVideoControlNetPipeline": {"video", "conditioning_frames"},
    "CogVideoXFunControlPipeline": {"control_video"},
    "WanVideoToVideoPipeline": {"video"},
    "LTXLatentUpsamplePipeline": {"video"},
    "IFSuperResolutionPipeline": {"image"},
    "StableDiffusionDepth2ImgPipeline": {"image"},
    "I2VGenXLPipeline": {"image"},
    "HunyuanImageRefinerPipeline": {"image"},
    # These run without.
    "BriaFiboEditPipeline": set(),
    "JoyImageEditPipeline": set(),
    "FluxKontextPipeline": set(),
    "WanVACEPipeline": set(),
    "StableDiffusionPipeline": set(),
}
"""What plain diffusers fails without, seen by leaving out one argument after the other of tiny pipelines."""


@pytest.mark.parametrize("name", NEEDED)
def test_needed_images_of_diffusers(name: str) -> None:
    takes = signature_of(getattr(diffusers, name))
    assert {*takes.needed_images, *(["image"] if takes.needs_image else [])} == NEEDED[name]
    others = NEEDED[name] - {"image"}
    assert bool(unservable(takes)) is bool(others)
    if not NEEDED[name]:
        return
    call: dict[str, Any] = {"prompt": "a", **{one: [PICTURE] for one in others}}
    call = {key: value for key, value in call.items() if key in takes.names}
    for left_out in sorted(NEEDED[name]):
        given = {key: value for key, value in call.items() if key != left_out}
        given |= {"pil_image": PICTURE} if "image" in NEEDED[name] - {left_out} else {}
        said = "an image" if left_out == "image" else left_out
        with pytest.raises(InputError, match=f"^{name} needs {said}; give "):
            build_requests(given, None, takes=takes)


class WorldPipeline:
    def __call__(self, prompt: Any = None, image: Any = None, video: Any = None, image_embeds: Any = None) -> None:
        """Needs one of them, which its signature does not say."""


def test_errors_for_a_missing_picture_name_what_was_not_given() -> None:
    takes = signature_of(WorldPipeline)
    (request,) = build_requests("a", None, takes=takes)
    assert request.images_left_out == ("image", "video")
    for error in (
        AttributeError("'NoneType' object has no attribute 'shape'"),
        TypeError("object of type 'NoneType' has no len()"),
        ValueError("Input is in incorrect format. Currently, we only support numpy.ndarray, torch.Tensor"),
    ):
        assert advice(request, error).startswith("; not given: image, video: the pipeline may need an image")
    assert advice(request, ValueError("the scheduler has no sigmas")) == ""
    (request,) = build_requests({"prompt": "a", "video": [PICTURE]}, None, takes=takes, pil_image=PICTURE)
    assert request.images_left_out == ()
    assert advice(request, TypeError("None")) == ""


def test_errors_of_computed_sizes_name_the_picture_that_is_too_narrow() -> None:
    takes = signature_of(WorldPipeline)
    errors = ValueError("height and width must be > 0"), ValueError("absolute aspect ratio must be smaller than 200")
    for size in ((1, 300), (3000, 20)):
        (request,) = build_requests("a", None, takes=takes, pil_image=Image.new("RGB", size))
        for error in errors:
            assert f"; perhaps image is too small or too narrow ({size[0]}x{size[1]})" in advice(request, error)
        assert "narrow" not in advice(request, ValueError("the scheduler has no sigmas"))
    (request,) = build_requests("a", None, takes=takes, pil_image=Image.new("RGB", (300, 300)))
    assert "narrow" not in advice(request, errors[0])


def test_embeddings_in_place_of_a_picture() -> None:
    takes = dataclasses.replace(signature_of(WorldPipeline), class_name="WorldImg2ImgPipeline")
    with pytest.raises(InputError, match="needs an image"):
        build_requests("a", None, takes=takes)
    assert build_requests({"prompt": "a", "image_embeds": [1.0]}, None, takes=takes)
