"""Prompts and parameters of users become pipeline calls."""

import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shardit.diffusion.output.output import Output
from shardit.diffusion.request.build import build_requests, params_of
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature, signature_of
from shardit.diffusion.request.result_limits import ResultLimits, limit_problem
from shardit.errors import InputError
from shardit.models import tiny
from shardit.params import MAX_SEED, OmniDiffusionSamplingParams
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.submit.resolve import arguments, pipeline_names
from shardit.server.options import ServeOptions
from shardit.settings.declare import declared

Params = OmniDiffusionSamplingParams


class DrawPipeline:
    def __call__(
        self,
        prompt=None,
        negative_prompt=None,
        height=None,
        width=None,
        num_inference_steps=50,
        sigmas=None,
        true_cfg_scale=4.0,
        num_images_per_prompt=1,
        generator=None,
        prompt_embeds=None,
        attention_kwargs=None,
        max_sequence_length=512,
        output_type="pil",
        return_dict=True,
        callback_on_step_end=None,
    ):
        """As Qwen-Image."""


class CatchAllPipeline(DrawPipeline):
    def __call__(self, prompt=None, strength=0.5, **kwargs):
        """As SD 1.5: ignores unknown arguments."""


class WanFakePipeline:
    def __call__(self, prompt=None, negative_prompt=None, num_frames=81, num_videos_per_prompt=1, output_type="np"):
        """As Wan."""


class WanFakeImageToVideoPipeline:
    def __call__(self, image, prompt=None, num_frames=81, num_videos_per_prompt=1, output_type="np"):
        """As Wan with an image."""


class FakeEditPlusPipeline:
    def __call__(self, image=None, prompt=None, output_type="pil"):
        """Requires images, although its signature has a default."""


class FakeLayeredPipeline:
    def __call__(self, image=None, prompt=None, layers=4):
        """Works on transparency."""


class RatePipeline:
    def __call__(self, prompt=None, num_frames=161, frame_rate=25, **kwargs):
        """Passes the frame rate to the model; takes any argument."""


class NoisePipeline:
    def __call__(self, batch_size, num_inference_steps=1000):
        """No prompt at all."""


DRAW = signature_of(DrawPipeline)


def build(prompts=None, params=None, takes=DRAW, second=None, **keywords):
    named = {name: keywords.pop(name, None) for name in ("prompt", "negative_prompt", "pil_image")}
    return build_requests(prompts, params, overrides=keywords, takes=takes, takes_with_image=second, **named)


def refused(message, *args, **keywords):
    with pytest.raises(InputError, match=message) as error:
        build(*args, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_string():
    (request,) = build("a cat")
    arguments = request.call_arguments()
    assert arguments == {"prompt": "a cat", "num_images_per_prompt": 1, "output_type": "pil"}
    assert request.index == 0
    assert request.pipeline == "DrawPipeline"
    assert 0 <= request.seed < 2**32


def test_dict_before_keyword_before_params():
    params = Params(height=16, width=16, num_inference_steps=2, seed=1)
    (request,) = build({"prompt": "a", "height": 64, "seed": 9}, params, width=32, height=32)
    arguments = request.call_arguments()
    assert (arguments["height"], arguments["width"], arguments["num_inference_steps"]) == (64, 32, 2)
    assert request.seed == 9
    assert params.height == 16


def test_keyword_form():
    (request,) = build(prompt="a", negative_prompt="b", true_cfg_scale=4.0, num_outputs_per_prompt=3)
    arguments = request.call_arguments()
    assert arguments["negative_prompt"] == "b"
    assert arguments["true_cfg_scale"] == 4.0
    assert arguments["num_images_per_prompt"] == request.num_outputs == 3


def test_several_prompts_and_params():
    requests = build(["a", {"prompt": "b", "seed": 2}], [Params(seed=1, width=16), Params(width=32)])
    assert [request.index for request in requests] == [0, 1]
    assert [request.seed for request in requests] == [1, 2]
    assert [request.kwargs["width"] for request in requests] == [16, 32]
    assert [request.seed for request in build(["a", "b"], Params(seed=3))] == [3, 3]


def test_the_name_of_vllm_omni_for_params():
    one, two = Params(width=16), Params(width=32)
    assert params_of(None, [one]) is one
    assert params_of(None, one) is one
    assert params_of(None, [one, two]) == [one, two]
    assert params_of(two, None) is two
    assert [request.kwargs["width"] for request in build(["a", "b"], params_of(None, [one]))] == [16, 16]
    with pytest.raises(InputError, match="params are given twice"):
        params_of(one, [two])


class FlagPipeline:
    def __call__(self, prompt=None, clean_caption=True, num_steps=4, scale=0.5, guess=None):
        """Has arguments of its own that are bools and numbers."""


FLAGS = signature_of(FlagPipeline)


@pytest.mark.parametrize(("given", "meant"), [
    (True, True), (False, False), ("true", True), ("FALSE", False), ("False", False), ("on", True), ("Off", False),
    ("YES", True), ("no", False), (np.bool_(False), False),
])  # fmt: skip
@pytest.mark.parametrize("where", ["prompt", "keyword", "extra_args"])
def test_texts_for_bools_are_bools(where, given, meant):
    prompt = {"prompt": "a", **({"clean_caption": given} if where == "prompt" else {})}
    params = Params(extra_args={"clean_caption": given}) if where == "extra_args" else None
    (request,) = build(prompt, params, FLAGS, **({"clean_caption": given} if where == "keyword" else {}))
    assert request.kwargs["clean_caption"] is meant


@pytest.mark.parametrize("value", ["maybe", "", 1, 0.0, None, [True], {}])
def test_values_that_are_not_bools_are_refused(value):
    refused("^clean_caption must be true or false, got", "a", Params(extra_args={"clean_caption": value}), FLAGS)


@pytest.mark.parametrize("name", ["num_steps", "scale"])
@pytest.mark.parametrize("value", ["4", "x", True, {}, [1, "2"]])
def test_values_that_are_not_numbers_are_refused(name, value):
    refused(f"^{name} must be a number, got", {"prompt": "a", name: value}, takes=FLAGS)


def test_other_values_stay_as_they_are():
    given = {"num_steps": None, "scale": [0.5, 1], "guess": "off"}
    assert build({"prompt": "a", **given}, takes=FLAGS)[0].kwargs.items() >= given.items()


class FamilyPipeline:
    def __call__(self, prompt=None, cfg_normalize=True, cfg_normalization=False, layers=4):
        """Has arguments of single families."""


def test_arguments_of_one_family_are_further_arguments():
    takes = signature_of(FamilyPipeline)
    params = Params(cfg_normalize="Off", cfg_normalization="yes", layers=2)
    assert params.extra_args == {"cfg_normalize": "Off", "cfg_normalization": "yes", "layers": 2}
    assert params == Params(extra_args=params.extra_args)
    for keywords in ({"params": params}, {"cfg_normalize": "Off", "cfg_normalization": "yes", "layers": 2}):
        (request,) = build("a", takes=takes, **keywords)
        assert request.kwargs == {"cfg_normalize": False, "cfg_normalization": True, "layers": 2}
    assert build("a", Params(cfg_normalization=0.5), takes)[0].kwargs["cfg_normalization"] == 0.5
    for name, value in (("cfg_normalize", "maybe"), ("cfg_normalize", 1), ("layers", "2"), *BAD_NORMS):
        refused(f"^{name} must be a number|^{name} must be true or false", "a", Params(**{name: value}), takes)
    refused("DrawPipeline takes no 'layers'", "a", Params(layers=2))
    with pytest.raises(InputError, match="'layers' has a field of its own"):
        Params(layers=2, extra_args={"layers": 2})


BAD_NORMS = [("cfg_normalization", value) for value in (-1, math.nan, math.inf, "4")]


class TensorPipeline:
    def __call__(
        self,
        prompt=None,
        latents: torch.Tensor | None = None,
        audio: torch.Tensor | None = None,
        sigmas: list[float] | None = None,
    ):
        """Takes tensors, and a list of numbers."""


@pytest.mark.parametrize("value", ["x.pt", 1, [1], [[1.0], "x"], {}, True, np.zeros(1), [np.zeros(1)]])
def test_values_that_are_not_tensors_are_refused(value):
    takes = signature_of(TensorPipeline)
    assert takes.tensors == ("latents", "audio")
    with pytest.raises(InputError, match="latents must be a tensor, got"):
        build("a", Params(extra_args={"latents": value}), takes=takes)
    for fine in (None, torch.zeros(1), [torch.zeros(1)]):
        build("a", Params(sigmas=[1.0], extra_args={"latents": fine, "audio": np.zeros(1)}), takes=takes)


class LastPipeline:
    def __call__(self, image=None, last_image: torch.Tensor | None = None, mask: torch.Tensor | None = None):
        """Takes pictures, the last one declared as a tensor, and a mask that is one."""


def test_a_picture_that_is_declared_as_a_tensor(tmp_path):
    takes, path = signature_of(LastPipeline), tmp_path / "last.png"
    picture = Image.new("RGB", (8, 6), "red")
    picture.save(path)
    for source in (str(path), path, path.read_bytes(), picture):
        (request,) = build({"last_image": source}, takes=takes)
        assert list(request.kwargs["last_image"].getdata()) == list(picture.getdata())
    with pytest.raises(InputError, match="last_image: image nowhere does not exist"):
        build({"last_image": "nowhere"}, takes=takes)
    with pytest.raises(InputError, match="mask must be a tensor"):
        build({"mask": str(path)}, takes=takes)


def test_arguments_given_twice_in_one_prompt():
    refused(
        "^scale is given twice, by its name and in extra_args",
        {"prompt": "a", "scale": 1, "extra_args": {"scale": 2}},
        takes=FLAGS,
    )


class PaintPipeline:
    def __call__(self, image=None, prompt=None, mask_image=None, control_video=None, ip_adapter_image=None, strength=1):
        """Takes pictures and a video besides the image."""


def test_paths_and_bytes_for_every_picture_argument(tmp_path):
    takes = signature_of(PaintPipeline)
    assert takes.images == ("mask_image", "control_video", "ip_adapter_image")
    mask = Image.new("L", (8, 6), 255)
    mask.save(tmp_path / "mask.png")
    frames = [Image.new("RGB", (32, 16), (40 * number, 0, 0)) for number in range(3)]
    (clip,) = Output(prompt="", seed=1, frames=[frames], fps=8).save(tmp_path / "clip.mp4")
    (request,) = build(
        {"prompt": "a", "mask_image": str(tmp_path / "mask.png"), "control_video": clip},
        Params(extra_args={"ip_adapter_image": [(tmp_path / "mask.png").read_bytes()]}),
        takes=takes,
        pil_image=mask,
    )
    given = request.call_arguments()
    assert (given["mask_image"].size, given["ip_adapter_image"][0].size) == ((8, 6), (8, 6))
    assert [frame.size for frame in given["control_video"]] == [(32, 16)] * 3
    assert request.settings()["control_video"] == "3 pictures 32x16"
    untouched = build({"prompt": "a", "mask_image": mask, "control_video": frames}, takes=takes)[0].call_arguments()
    assert untouched["mask_image"] is mask
    assert untouched["control_video"] == frames
    for name, value, words in (
        ("mask_image", "nothing.png", "mask_image: image nothing.png does not exist"),
        ("control_video", "nothing.mp4", "control_video: video nothing.mp4 does not exist"),
        ("control_video", str(tmp_path / "mask.txt"), "control_video: video .*mask.txt cannot be read"),
    ):
        (tmp_path / "mask.txt").write_text("no video")
        with pytest.raises(InputError, match=words):
            build({"prompt": "a", name: value}, takes=takes)


class FakeInpaintPipeline:
    def __call__(self, prompt=None, image=None, mask_image=None, masked_image_latents=None):
        """Fails late without a mask, although its signature has a default."""


def test_an_inpainting_pipeline_needs_a_mask():
    takes, picture = signature_of(FakeInpaintPipeline), Image.new("RGB", (8, 8))
    assert takes.needed_images == (takes.mask_name,) == ("mask_image",)
    for mask in ({}, {"mask_image": None}):
        asked = {"prompt": "a", **mask}
        refused("^FakeInpaintPipeline needs mask_image; give it", asked, None, takes, pil_image=picture)
    for mask in ({"mask_image": picture}, {"masked_image_latents": torch.zeros(1)}):
        build({"prompt": "a", **mask}, takes=takes, pil_image=picture)
    assert signature_of(PaintPipeline).needed_images == ()


class MaskedVideoPipeline:
    def __call__(
        self,
        prompt=None,
        video: list[Image.Image] | None = None,
        mask: list[Image.Image | torch.Tensor] | None = None,
        reference_images: "typing.Optional[typing.List[PIL.Image.Image]]" = None,  # noqa: F821
        last_image: Image.Image | list[Image.Image] | None = None,
    ):
        """Wants a mask for each frame."""


def test_a_mask_of_a_video_is_a_video_or_one_picture_for_all_frames(tmp_path):
    takes = signature_of(MaskedVideoPipeline)
    assert takes.listed == ("video", "mask", "reference_images")
    frames = [Image.new("RGB", (32, 16), (40 * number, 0, 0)) for number in range(3)]
    (clip,) = Output(prompt="", seed=1, frames=[frames], fps=8).save(tmp_path / "clip.mp4")
    frames[1].save(still := tmp_path / "still.png")

    def given(**values):
        return build({"prompt": "a", **values}, takes=takes)[0].call_arguments()

    both = given(video=clip, mask=clip)
    assert [frame.size for frame in both["mask"]] == [frame.size for frame in both["video"]] == [(32, 16)] * 3
    for mask in (still, str(still), still.read_bytes(), frames[1]):
        held = given(video=clip, mask=mask)["mask"]
        assert [one.tobytes() for one in held] == [frames[1].tobytes()] * 3
    assert len(given(mask=still)["mask"]) == len(given(video=clip, mask=[still])["mask"]) == 1
    assert [one.size for one in given(reference_images=still)["reference_images"]] == [(32, 16)]
    assert given(last_image=still)["last_image"].size == (32, 16)
    assert given(video=clip, mask=(numbers := torch.zeros(1, 3)))["mask"] is numbers


def test_lists_of_pictures_of_real_pipelines():
    import diffusers

    from shardit.diffusion.preflight.static_signature import static_signature

    for name in (
        "WanVACEPipeline",
        "WanAnimatePipeline",
        "StableDiffusionInpaintPipeline",
        "CosmosVideoToWorldPipeline",
    ):
        found = signature_of(getattr(diffusers, name)).listed
        assert found == static_signature(name).listed or name.startswith("Cosmos")
    assert signature_of(diffusers.WanVACEPipeline).listed == ("video", "mask", "reference_images")
    assert signature_of(diffusers.StableDiffusionInpaintPipeline).listed == ()


@pytest.mark.parametrize(("name", "words"), [("prompt", "prompt"), ("image", "pil_image"), ("pil_image", "pil_image")])
def test_prompt_and_image_are_no_further_arguments(name, words):
    """They would be silently dropped in favour of those given in their places."""
    for prompts, params in (
        ({"prompt": "a", "extra_args": {name: "b"}}, None),
        ("a", Params(extra_args={name: "b"})),
    ):
        with pytest.raises(InputError, match=f"^{name} cannot be among the further arguments; give it as {words} "):
            build(prompts, params, takes=signature_of(PaintPipeline))


def test_settings_are_enough_to_make_it_again():
    params = Params(num_inference_steps=np.int64(4), true_cfg_scale=np.float32(2.5), output_type="np")
    (request,) = build("a", params)
    names = ("num_inference_steps", "true_cfg_scale", "output_type")
    assert [request.settings()[name] for name in names] == [4, 2.5, "np"]
    assert [type(request.settings()[name]) for name in names] == [int, float, str]
    assert "output_type" not in build("a")[0].settings()


def test_picture_arguments_of_real_pipelines():
    import diffusers

    def pictures(name):
        return signature_of(getattr(diffusers, name)).images

    assert pictures("WanImageToVideoPipeline") == ("last_image",)
    assert set(pictures("WanVACEPipeline")) == {"video", "mask", "reference_images"}
    assert set(pictures("StableDiffusionXLControlNetInpaintPipeline")) >= {"mask_image", "control_image"}
    assert pictures("FluxPipeline") == ("ip_adapter_image", "negative_ip_adapter_image")
    assert pictures("QwenImagePipeline") == ()


def test_steps_and_a_list_of_another_length():
    takes = PipelineSignature(
        "P", ("prompt", "num_inference_steps", "sigmas", "timesteps"), {"num_inference_steps": 50}
    )
    rest = {"prompt": None, "negative_prompt": None, "pil_image": None, "takes": takes}
    for name in ("sigmas", "timesteps"):
        with pytest.raises(InputError, match=rf"num_inference_steps and {name} disagree \(7 and 2 entries\); give one"):
            build_requests("a", None, overrides={name: [1.0, 0.5], "num_inference_steps": 7}, **rest)
        assert build_requests("a", None, overrides={name: [1.0, 0.5], "num_inference_steps": 2}, **rest)
        [request] = build_requests("a", None, overrides={name: [1.0, 0.5]}, **rest)
        assert "num_inference_steps" not in request.settings()
    [request] = build_requests("a", None, overrides={}, **rest)
    assert request.settings()["num_inference_steps"] == 50
    assert "num_inference_steps" not in tiny.filled_in("flux", ["sigmas"])


def test_drawn_seeds_differ():
    assert len({request.seed for request in build(["a"] * 20)}) == 20


def test_seed_of_minus_one_is_a_drawn_one():
    seeds = [request.seed for request in build(["a", {"prompt": "b", "seed": -1}, {"prompt": "c", "seed": 4}], seed=-1)]
    assert seeds[2] == 4
    assert len(set(seeds)) == 3
    assert min(seeds) >= 0
    assert build("a", Params(seed=-1))[0].seed >= 0


def test_empty_prompt_and_embeddings():
    assert build("")[0].call_arguments()["prompt"] == ""
    (request,) = build({"prompt_embeds": [1.0]})
    assert request.prompt is None
    assert request.call_arguments()["prompt_embeds"] == [1.0]
    assert "prompt" not in request.call_arguments()


def test_extra_args_reach_the_pipeline():
    (request,) = build({"prompt": "a", "prompt_embeds": 2}, Params(extra_args={"prompt_embeds": 1}))
    assert request.kwargs["prompt_embeds"] == 2
    refused("takes no 'nothing'", "a", Params(extra_args={"nothing": 1}))


def test_wrong_prompts():
    refused("prompt is given twice", "a", prompt="b")
    refused("list of prompts is empty", [])
    refused("needs a prompt")
    refused("needs a prompt", {"seed": 1})
    refused("prompts must be a string", 5)
    refused("prompts must be a string, a dict or a list of them, got bytes", b"a cat")
    refused(r"prompts\[1\] must be a string or a dict, got int", ["a", 5])
    refused("prompt must be a string, got list", prompt=["a", "b"])
    refused(r"prompts\[1\]: height must be a whole number", ["a", {"prompt": "b", "height": -1}])


def test_wrong_params():
    refused("params has 1 entries for 2 prompts", ["a", "b"], [Params()])
    refused("params has 0 entries", "a", [])
    refused("params must be OmniDiffusionSamplingParams", "a", {"height": 5})
    refused(r"params\[0\] must be", "a", [{"height": 5}])


def test_unknown_parameters_get_a_suggestion_and_a_list():
    text = refused(r"takes no 'num_inference_step' \(did you mean 'num_inference_steps'\?\)", "a", num_inference_step=3)
    assert "it takes: prompt, negative_prompt, height, width" in text
    assert "generator" not in text
    assert "num_outputs_per_prompt" in text
    refused("did you mean 'negative_prompt'", {"prompt": "a", "negativ_prompt": "b"})
    with pytest.raises(InputError, match="did you mean 'height'"):
        Params(heigth=5)


@pytest.mark.parametrize("where", ["keyword", "prompt", "extra_args", "params"])
def test_arguments_that_a_pipeline_would_ignore_are_refused(where):
    takes = signature_of(CatchAllPipeline)
    given = {"prompt": "a", "sed": 1} if where == "prompt" else "a"
    params = {"extra_args": Params(extra_args={"sed": 1}), "params": Params(num_frames=9)}.get(where)
    overrides = {"sed": 1} if where == "keyword" else {}
    with pytest.raises(InputError, match=r"takes no 'sed' .did you mean 'seed'|takes no num_frames"):
        build_requests(
            given, params, prompt=None, negative_prompt=None, pil_image=None, overrides=overrides, takes=takes
        )


def test_names_that_an_overridden_call_takes_pass():
    takes = signature_of(CatchAllPipeline)
    assert "true_cfg_scale" in takes.names
    assert "strength" in takes.names


def test_parameters_of_other_pipelines():
    assert "it takes: prompt" in refused("DrawPipeline takes no num_frames", "a", Params(num_frames=5))
    refused("takes no guidance_scale, fps", "a", guidance_scale=2.0, fps=16)
    refused("DrawPipeline takes no image", "a", pil_image=Image.new("RGB", (2, 2)))
    refused("takes no num_outputs_per_prompt", "a", takes=signature_of(RatePipelineWithout), num_outputs_per_prompt=2)


class RatePipelineWithout:
    def __call__(self, prompt=None, num_frames=1):
        """Makes one."""


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("generator", "seed"),
        ("num_images_per_prompt", "num_outputs_per_prompt"),
        ("return_dict", "Output"),
        ("callback_on_step_end", "shardit.parallelize"),
    ],
)
def test_reserved_arguments(name, advice):
    assert advice in refused(f"{name} cannot be given", "a", **{name: 1})


def test_texts_are_valid_in_every_place():
    says = "must be valid text in UTF-8"
    refused(f"prompt {says}", "caf\udce9")
    refused(f"negative_prompt {says}", {"prompt": "a", "negative_prompt": "caf\udce9"})
    refused(f"note {says}", {"prompt": "a", "note": ["b", {"caf\udce9": 1}]}, takes=NOTED)
    refused("takes no 'caf", {"prompt": "a", "caf\udce9": 1})
    refused(r"prompts\[1\]: prompt", ["a", "\ud800"])


class NotePipeline:
    def __call__(self, prompt=None, note=None, ip_adapter_image=None, ip_adapter_image_embeds=None):
        """With an argument of its own."""


NOTED = signature_of(NotePipeline)


def test_pictures_for_an_adapter_that_is_not_loaded():
    lacking = dataclasses.replace(NOTED, lacks_adapter=True)
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        refused(f"{name} cannot be given; the model has no IP-Adapter", {"prompt": "a", name: [1]}, takes=lacking)
    assert lacking.choices == ["prompt", "note", "seed"]
    assert build({"prompt": "a", "ip_adapter_image_embeds": [1]}, takes=NOTED)


def test_more_outputs_than_any_pipeline_makes():
    assert limit_problem({"audio_length_in_s": 1e9}, {}, ResultLimits()) == (
        "audio_length_in_s",
        "is 1000000000.0 seconds, the limit is 1048576; ask for less",
    )
    refused("num_outputs_per_prompt is 10001 outputs, the limit is 10000", "a", num_outputs_per_prompt=10001)


def test_names_that_no_attention_reads():
    refused("attention_kwargs takes no 'scal' .did you mean 'scale'", "a", attention_kwargs={"scal": 0.5})
    assert build("a", attention_kwargs={"scale": 0.5})


@pytest.mark.parametrize(("name", "value", "why"), [
    ("ip_hidden_states", [np.ones(2)], "has no effect without an IP-Adapter, which this model lacks; leave it out"),
    ("ip_adapter_masks", [np.ones(2)], "has no effect without an IP-Adapter"),
    ("attention_mask", "x", "must be a tensor or a list of tensors, got 'x'; give one to shardit.Omni"),
    ("attention_mask", [[1, 0]], "must be a tensor or a list of tensors"),
    ("scale", "0.5", "must be a finite number, got '0.5'"),
    ("scale", None, "must be a finite number"),
    ("scale", 1e308, r"must be a finite number within 3.4e\+38, got 1e\+308"),
    ("gligen", 1, "must be a dict, got 1"),
])  # fmt: skip
def test_values_that_no_attention_takes(name, value, why):
    refused(f"^attention_kwargs: {name} {why}", "a", attention_kwargs={name: value})


def test_masks_for_an_adapter_that_is_loaded():
    adapted = dataclasses.replace(DRAW, adapted=True)
    assert build("a", takes=adapted, attention_kwargs={"ip_adapter_masks": [np.ones(2)], "attention_mask": np.ones(2)})
    refused("ip_adapter_masks must be a tensor", "a", takes=adapted, attention_kwargs={"ip_adapter_masks": "m.png"})


class NumberPipeline:
    def __call__(self, prompt=None, audio_guidance_scale=4.0, steps_mask=2, max_timesteps=1.5):
        """With numbers of its own."""


@pytest.mark.parametrize("value", [1e308, -(10**400), math.inf, math.nan, [1.0, 1e39]])
def test_numbers_that_no_tensor_takes(value):
    takes = signature_of(NumberPipeline)
    refused("^audio_guidance_scale must be a finite number", "a", takes=takes, audio_guidance_scale=value)
    assert build("a", takes=takes, audio_guidance_scale=3e38, steps_mask=None)


def test_arrays_in_place_of_words_and_lists():
    refused("^output_type must be 'pil'", "a", output_type=np.array([]))
    assert build("a", takes=signature_of(NumberPipeline), max_timesteps=torch.tensor(1.0))


def test_functions_cannot_travel():
    refused("prompt_embeds is a function", "a", prompt_embeds=print)


def test_videos():
    takes = signature_of(WanFakePipeline)
    (request,) = build("a", Params(num_frames=9, fps=8, num_outputs_per_prompt=2), takes=takes)
    assert request.call_arguments() == {
        "prompt": "a",
        "num_frames": 9,
        "num_videos_per_prompt": 2,
        "output_type": "pil",
    }
    assert request.fps == 8.0
    assert build("a", takes=takes)[0].fps == 16.0
    assert takes.kind == "video"
    assert signature_of(WanFakePipeline, {"expand_timesteps": True}).default_fps == 24.0


def test_frame_rate_argument():
    takes = signature_of(RatePipeline)
    assert build("a", takes=takes)[0].fps == 25.0
    (request,) = build("a", takes=takes, fps=10)
    assert request.kwargs["frame_rate"] == 10
    (request,) = build("a", takes=takes, frame_rate=8.0)
    assert (repr(request.kwargs["frame_rate"]), request.fps) == ("8", 8.0)


@pytest.mark.parametrize("value", ["30fps", "8", 0, -1, True, None, math.nan, math.inf])
def test_frame_rate_under_the_models_own_name_is_checked(value):
    refused("^frame_rate must be", "a", takes=signature_of(RatePipeline), frame_rate=value)


def test_images(tmp_path):
    red = Image.new("RGB", (4, 2), "red")
    red.save(tmp_path / "red.png")
    takes = signature_of(WanFakeImageToVideoPipeline)
    for image in (red, str(tmp_path / "red.png"), [red]):
        (request,) = build("a", takes=takes, pil_image=image)
        assert request.call_arguments()["image"].tobytes() == red.tobytes()
    assert build({"prompt": "a", "image": red}, takes=takes, pil_image="none.png")[0].images[0].size == (4, 2)
    assert request.settings()["input_image_sizes"] == [[4, 2]]
    refused("needs an image", "a", takes=takes)
    refused("takes one image, got 2", "a", takes=takes, pil_image=[red, red])
    refused("image none.png does not exist", "a", takes=takes, pil_image="none.png")
    refused("list of images is empty", "a", takes=takes, pil_image=[])
    refused("image is given twice", {"prompt": "a", "image": red, "pil_image": red}, takes=takes)


def test_several_images_and_transparency():
    red, clear = Image.new("RGB", (4, 2), "red"), Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    (request,) = build("a", takes=signature_of(FakeEditPlusPipeline), pil_image=[red, clear])
    assert [image.mode for image in request.call_arguments()["image"]] == ["RGB", "RGB"]
    (request,) = build("a", takes=signature_of(FakeLayeredPipeline), pil_image=clear)
    assert request.images[0].getpixel((0, 0)) == (0, 0, 0, 0)
    refused("FakeEditPlusPipeline needs an image", "a", takes=signature_of(FakeEditPlusPipeline))


def test_second_pipeline_for_requests_with_an_image():
    both = {"takes": signature_of(WanFakePipeline), "second": signature_of(WanFakeImageToVideoPipeline)}
    plain, with_image = build(["a", {"prompt": "b", "pil_image": Image.new("RGB", (2, 2))}], **both)
    assert (plain.pipeline, with_image.pipeline) == ("WanFakePipeline", "WanFakeImageToVideoPipeline")
    assert "image" in with_image.call_arguments()


def test_pipeline_without_prompt():
    takes = signature_of(NoisePipeline)
    assert build({"batch_size": 2}, takes=takes)[0].call_arguments() == {"batch_size": 2}
    refused("NoisePipeline needs batch_size", takes=takes)
    refused("NoisePipeline takes no prompt", {"prompt": "a", "batch_size": 2}, takes=takes)


def test_requests_and_signatures_travel():
    (request,) = build("a", takes=signature_of(FakeEditPlusPipeline), pil_image=Image.new("RGB", (2, 2), "red"))
    again = pickle.loads(pickle.dumps(request))
    assert again.seed == request.seed
    assert again.images[0].tobytes() == request.images[0].tobytes()
    assert pickle.loads(pickle.dumps(DRAW)) == DRAW


@pytest.mark.parametrize("name", ["height", "width", "num_frames", "num_inference_steps", "num_outputs_per_prompt"])
@pytest.mark.parametrize("value", [0, -5, True, 1.5, "8", math.nan])
def test_counts(name, value):
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least 1"):
        Params(**{name: value})


@pytest.mark.parametrize("name", ["guidance_scale", "guidance_scale_2", "true_cfg_scale"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "4", 1e308, 10**400])
def test_scales(name, value):
    with pytest.raises(InputError, match=name):
        Params(**{name: value})


@pytest.mark.parametrize("fields", [
    {"seed": -2}, {"seed": 2**63}, {"seed": True}, {"seed": 1.0}, {"fps": 0}, {"fps": -1}, {"fps": math.nan},
    {"sigmas": []}, {"sigmas": "1"}, {"sigmas": [1.0, math.nan]}, {"strength": 1.1}, {"negative_prompt": 5},
    {"output_type": "jpg"}, {"attention_kwargs": [1]}, {"extra_args": [1]},
    {"extra_args": {1: 2}}, {"extra_args": {"height": 16}}, {"num_outputs_per_prompt": None},
])  # fmt: skip
def test_other_wrong_values(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        Params(**fields)


@given(seed=st.integers(0, MAX_SEED), scale=st.floats(0, 1e6), steps=st.integers(1, 10**6))
def test_good_values_are_kept(seed, scale, steps):
    params = Params(seed=seed, guidance_scale=scale, num_inference_steps=steps)
    assert params.given() == {
        "seed": seed,
        "guidance_scale": scale,
        "num_inference_steps": steps,
        "num_outputs_per_prompt": 1,
    }
    assert pickle.loads(pickle.dumps(params)) == params


def test_largest_seed_is_one_that_torch_takes():
    torch = pytest.importorskip("torch")
    assert torch.Generator("cpu").manual_seed(MAX_SEED).initial_seed() == MAX_SEED


def test_params_keep_no_callers_dict():
    extra = {"latents": 1}
    params = Params(extra_args=extra)
    extra["other"] = 2
    assert params.extra_args == {"latents": 1}
    assert Params(extra_args=None).extra_args == {}


def test_every_field_is_documented():
    assert [item.name for item in declared(Params)] == list(Params.__dataclass_fields__)
    assert all(item.metadata["help"] and item.metadata["check"].meaning for item in declared(Params))


def test_fields_are_arguments_of_real_pipelines():
    """Every field but our own is an argument of at least one pipeline that shardit is made for."""
    diffusers = pytest.importorskip("diffusers")
    classes = (
        "WanPipeline WanImageToVideoPipeline QwenImagePipeline QwenImageEditPipeline QwenImageLayeredPipeline "
        "ZImagePipeline LongCatImagePipeline OvisImagePipeline StableDiffusion3Pipeline FluxPipeline "
        "FluxImg2ImgPipeline LTXPipeline CogVideoXPipeline"
    )
    signatures = [signature_of(getattr(diffusers, name)) for name in classes.split()]
    known = {name for signature in signatures for name in signature.names}
    own = {"seed", "fps", "num_outputs_per_prompt", "extra_args"}
    assert set(Params.__dataclass_fields__) - own <= known
    needs_image = [signature.class_name for signature in signatures if signature.needs_image]
    assert needs_image == [
        "WanImageToVideoPipeline",
        "QwenImageEditPipeline",
        "QwenImageLayeredPipeline",
        "FluxImg2ImgPipeline",
    ]


class ListPipeline:
    def __call__(
        self,
        prompt: str | None = None,
        crops: tuple[int, int] = (0, 0),
        layers: tuple[int, ...] | None = (1, 2),
        instruction: list[str] | None = ["a"],  # noqa: B006
        sizes: int | tuple[int, int] = 1,
        ratio: float = 1.3,
        flag: bool = True,
    ) -> None: ...


def test_tuples_and_lists_of_texts_from_json():
    takes = signature_of(ListPipeline)
    assert dict(takes.tuples) == {"crops": 2, "layers": 0}
    assert takes.text_lists == ("instruction",)
    right = {"crops": [3, 4.5], "layers": [1, 2, 3], "instruction": ["x"], "sizes": [1, 2]}
    (request,) = build("a", Params(extra_args=right), takes)
    assert request.kwargs == {"crops": (3, 4.5), "layers": (1, 2, 3), "instruction": ["x"], "sizes": [1, 2]}
    nulls = dict.fromkeys(("crops", "layers", "instruction", "ratio"))
    assert build("a", Params(extra_args=nulls), takes)[0].kwargs == nulls
    for value in ([1], [1, 2, 3], [1, "a"], [1, math.nan], 5, "x", [True, 1]):
        refused(r"^crops must be 2 numbers, such as \[0, 1\], got", "a", Params(extra_args={"crops": value}), takes)
    refused(r"^layers must be some numbers, such as \[1, 2, ...\]", "a", Params(extra_args={"layers": 5}), takes)
    for value in ("text", [5], 5, {"a": "b"}):
        refused("^instruction must be a list of texts", "a", Params(extra_args={"instruction": value}), takes)
    # Over HTTP: null is the default, except where it has a meaning of its own.
    given = {"prompt": "a", "flag": None, **nulls, "extra_args": {"layers": [5]}}
    options = ServeOptions(model="m", data_dir=Path("data"))
    asked = arguments(given, takes, options)
    assert asked == {"prompt": "a", "extra_args": {"crops": None, "instruction": None, "ratio": None, "layers": (5,)}}
    with pytest.raises(ApiError, match="instruction must be a list of texts") as error:
        arguments({"prompt": "a", "instruction": "x"}, takes, options)
    assert error.value.param == "instruction"


class AnnotatedPipeline:
    def __call__(
        self,
        prompt: str | None = None,
        image: object = None,
        image_guidance_scale: float = 1.5,
        guess_mode: bool = False,
        padding_mask_crop: int | None = None,
        prompt_embeds_scale: float | list[float] = 1.0,
        bpm: int | None = None,
        key: str | None = None,
        words: dict[str, object] | None = None,
        labels: list[int] | None = None,
        thresholds: dict = {0: 0.05, 10: 0.5},  # noqa: B006
        anything: "np.ndarray | int | None" = None,
        use_mask: bool | None = None,
        mask_image: object = None,
        image_embeds: "torch.Tensor | None" = None,
        audio_sampling_rate: "torch.Tensor | None" = None,
        ip_adapter_image: object = None,
        parallel: int = 10,
    ) -> None: ...


ANNOTATED = signature_of(AnnotatedPipeline)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("bpm", ["100", [1], {"a": 1}, True], "a number"),
        ("image_guidance_scale", [[1, 2], "x"], "a number"),
        ("key", [3, ["a"], False], "a text"),
        ("words", ["abc", 5, [1]], "a dict of names"),
        ("labels", [1, "a", {"a": 1}], "a list"),
        ("prompt_embeds_scale", [{"a": 1}], "a number"),
        ("use_mask", [1, [True]], "true or false"),
        ("image_embeds", [[], [[1, 2], [3, 4]], 5], "a tensor"),
        ("mask_image", [5, {"a": 1}, [], [1, 2], True], "an image, the path of one or a list of these"),
    ],
)
def test_values_of_another_form_than_the_annotation(name, wrong, says):
    for value in wrong:
        refused(f"^{name}:? must be {says}", "a", Params(extra_args={name: value}), ANNOTATED)


def test_values_as_the_annotations_say():
    right = {
        "bpm": 100,
        "key": "C",
        "words": {"a": 1},
        "labels": [1, 2],
        "anything": "x",
        "use_mask": False,
        "parallel": 2,
    }
    right |= {"parallel": 2, "prompt_embeds_scale": [0.5, 1], "audio_sampling_rate": 8, "image_embeds": torch.ones(1)}
    assert build("a", Params(extra_args=right), ANNOTATED)[0].kwargs == right
    (request,) = build("a", Params(extra_args={"thresholds": {"0": 0.9, "x": 1}}), ANNOTATED)
    assert request.kwargs == {"thresholds": {0: 0.9, "x": 1}}
    lacking = dataclasses.replace(ANNOTATED, lacks_adapter=True)
    assert build("a", Params(), lacking)[0].images_left_out == ("image", "mask_image")


def test_numbers_are_sent_whatever_their_names_are():
    info = ModelInfo(ANNOTATED, None)
    sent = {"image_guidance_scale", "guess_mode", "padding_mask_crop", "prompt_embeds_scale", "use_mask", "bpm"}
    names = set(pipeline_names(info))
    assert sent <= names
    assert not names & {"image_embeds", "mask_image", "ip_adapter_image"}
