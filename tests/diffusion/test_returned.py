"""Results of pipelines besides pictures: found from the fields, in the Output and in files, with nothing lost."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import pickle
from types import SimpleNamespace
from typing import NamedTuple

import av
import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipelineOutput
from diffusers.pipelines.kandinsky6.pipeline_output import Kandinsky6TI2VAPipelineOutput
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from diffusers.pipelines.marigold.pipeline_marigold_depth import MarigoldDepthOutput
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.pipelines.shap_e.renderer import MeshDecoderOutput
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from PIL import Image
from safetensors.numpy import load_file

from shardit.diffusion.output.collect import NOT_NUMBERS, collect, error_text, with_arrays
from shardit.diffusion.output.output import Output, savable
from shardit.diffusion.preflight.static_signature import static_signature
from shardit.diffusion.request.build import build_requests
from shardit.diffusion.request.pipeline_signature import PipelineSignature, signature_of
from shardit.diffusion.request.returned import sample_rate_of
from shardit.engine.tasks.library_warnings import LONGEST_WARNING, warnings_of
from shardit.errors import InputError
from shardit.params import OmniDiffusionSamplingParams

RED, FRAMES = Image.new("RGB", (32, 16), "red"), [Image.new("RGB", (32, 16), (i * 20, 0, 0)) for i in range(5)]
TONE = 0.5 * torch.sin(torch.arange(8000) * 0.25)


class Anything:
    def __call__(self, prompt=None, num_waveforms_per_prompt=1, output_type="pil", fps=7):
        pass


def request(rate: int | None = 16000, **chosen):
    takes = signature_of(Anything, sample_rate=rate)
    return build_requests(
        "a", None, prompt=None, negative_prompt=None, pil_image=None, overrides={"seed": 1, **chosen}, takes=takes
    )[0]


def output_of(result, rate: int | None = 16000, **chosen) -> Output:
    return collect(request(rate, **chosen), (result, 0.1, []), None)


@pytest.mark.parametrize(
    "result",
    [
        LTX2PipelineOutput(frames=[FRAMES], audio=torch.stack([TONE, -TONE])[None]),
        Cosmos3OmniPipelineOutput(video=FRAMES, sound=torch.stack([TONE, -TONE])),
        Kandinsky6TI2VAPipelineOutput(frames=[FRAMES], audio=TONE[None].numpy()),
    ],
    ids=["ltx2", "cosmos3", "kandinsky6"],
)
def test_a_video_keeps_its_sound(result, tmp_path):
    output = output_of(result)
    assert output.frames == [FRAMES]
    assert output.audio.shape[::2] == (1, 8000)
    assert torch.equal(output.audio[0, 0], TONE)
    (path,) = output.save(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        (track,) = container.streams.audio
        assert (track.codec_context.name, track.rate, track.channels) == ("aac", 16000, output.audio.shape[1])
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(track)], axis=1)[0]
        assert container.streams.video[0].frames == 5
    assert heard.std() == pytest.approx(TONE.numpy().std(), rel=0.1)
    # The same tone: the strongest frequency is where it was.
    assert np.abs(np.fft.rfft(heard[:8000])).argmax() == pytest.approx(8000 * 0.25 / 2 / np.pi, abs=3)
    assert output.save(tmp_path / "a.wav") == [tmp_path / "a.wav"]


@pytest.mark.parametrize("rate", [44100, 100_000])
def test_sound_becomes_wav(tmp_path, rate):
    output = output_of(AudioPipelineOutput(audios=TONE.repeat(2, 1).numpy()), rate, num_outputs_per_prompt=2)
    assert output.audio.shape == (2, 1, 8000)
    assert output.kinds == ("audio", "tensors")
    paths = output.save(tmp_path / "a.wav")
    assert [path.name for path in paths] == ["a-0.wav", "a-1.wav"]
    with av.open(str(paths[0])) as container:
        (track,) = container.streams.audio
        assert (track.codec_context.name, track.rate) == ("pcm_s16le", rate)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(track)], axis=1)[0]
        record = json.loads(container.metadata["comment"])
    assert np.abs(heard / 32768 - TONE.numpy()).max() < 1e-4
    assert (record["seed"], record["sample_rate"]) == (1, rate)
    with pytest.raises(InputError, match=r"does not fit sound or numbers; use an extension among \.wav, \.safetensors"):
        output.save(tmp_path / "a.png")


def test_sound_that_cannot_be_written(tmp_path):
    unknown = output_of(LTX2PipelineOutput(frames=[FRAMES], audio=TONE[None, None]), rate=None)
    for name in ("a.wav", "a.mp4"):
        with pytest.raises(InputError, match="does not define its sample rate"):
            unknown.save(tmp_path / name)
    silent, notes = savable(unknown)
    assert (silent.audio, silent.frames, len(notes)) == (None, unknown.frames, 1)
    known = output_of(LTX2PipelineOutput(frames=[FRAMES], audio=TONE[None, None]))
    assert savable(known) == (known, [])
    assert output_of(AudioPipelineOutput(audios=TONE[None].numpy()), rate=None).kinds == ("tensors",)
    with pytest.raises(InputError, match="7 channels"):
        output_of(LTX2PipelineOutput(frames=[FRAMES], audio=TONE.repeat(1, 7, 1))).save(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="3 waveforms for 1 videos"):
        output_of(LTX2PipelineOutput(frames=[FRAMES], audio=TONE.repeat(3, 1, 1))).save(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_sample_rates():
    def part(**config):
        return SimpleNamespace(config=config)

    vocoder = part(output_sampling_rate=24000, input_sampling_rate=16000)
    assert sample_rate_of({"audio_vae": part(sample_rate=16000), "vocoder": vocoder}) == 24000  # LTX-2
    assert sample_rate_of({"unet": SimpleNamespace(config=SimpleNamespace(sample_rate=8000))}) == 8000
    assert sample_rate_of({"vae": part(sampling_rate=44100), "scheduler": part(), "tokenizer": None}) == 44100
    assert sample_rate_of({"vae": part(scaling_factor=1.0), "other": object()}) is None


def test_values_that_are_no_numbers_are_noted():
    broken = torch.full((1, 3, 4, 4), float("nan"))
    for made in (broken, broken.numpy(), [broken]):
        assert output_of({"images": made}).notes == [NOT_NUMBERS]
    assert output_of({"images": torch.zeros(1, 3, 4, 4), "count": torch.ones(2, dtype=torch.int64)}).notes == []


def test_maps_become_pictures(tmp_path):
    depth = np.linspace(0, 1, 8, dtype=np.float32).reshape(1, 2, 4, 1)
    output = output_of(MarigoldDepthOutput(prediction=depth, uncertainty=None, latent=None))
    assert np.array_equal(output.extra["prediction"], depth)
    (path,) = output.save(tmp_path / "a.png")
    grey = np.asarray(Image.open(path))
    assert (grey.dtype, grey.shape, grey.min(), grey.max()) == (np.uint16, (2, 4), 0, 65535)
    normals = torch.zeros(2, 3, 2, 4, dtype=torch.bfloat16)
    normals[:, 2], normals[:, 0] = 1, -1
    made = output_of(MarigoldDepthOutput(prediction=normals, uncertainty=None, latent=None)).pictures()
    assert [picture.getpixel((0, 0)) for picture in made] == [(0, 128, 255)] * 2
    output.save(tmp_path / "a.jpg")


def test_results_without_a_picture_form_are_extra(tmp_path):
    mesh = MeshDecoderOutput(verts=torch.ones(4, 3), faces=torch.zeros(2, 3, dtype=torch.long), vertex_channels={})
    output = output_of({"images": [mesh], "image_embeds": torch.ones(1, 8, dtype=torch.bfloat16), "n": 3})
    assert output.error is None
    assert output.kinds == ("tensors",)
    assert torch.equal(output.extra["images"][0]["verts"], mesh.verts)
    assert output.extra["n"] == 3
    (path,) = output.save(tmp_path / "a.safetensors")
    held = load_file(path)
    assert {name: array.shape for name, array in held.items()} == {
        "images.0.verts": (4, 3),
        "images.0.faces": (2, 3),
        "image_embeds": (1, 8),
    }
    assert output.left_out(path) == ["n"]


def test_text(tmp_path):
    output = output_of({"sequences": torch.ones(2, 4, dtype=torch.long), "texts": ["a cat", "狗"]})
    assert output.texts == ["a cat", "狗"]
    assert [path.read_text() for path in output.save(tmp_path / "a.txt")] == ["a cat", "狗"]
    assert output.kinds == ("text", "tensors")
    both = output_of({"images": [RED], "text": ["a cat"]})
    assert both.left_out("a.png") == ["texts"]


class Named(NamedTuple):
    pictures: list
    score: float


@pytest.mark.parametrize(
    ("result", "images", "extra"),
    [
        ((torch.ones(2), [RED]), 1, {"output_0"}),
        (Named([RED, RED], 0.5), 2, {"score"}),
        ([RED], 1, set()),
        (RED, 1, set()),
        (torch.ones(2), 0, {"output"}),
        ({"anything": {"deep": [np.float32(1), None]}}, 0, {"anything"}),
        (SimpleNamespace(image=[RED], rest=1), 1, {"rest"}),
        (StableDiffusionPipelineOutput(images=[RED], nsfw_content_detected=[False]), 1, {"nsfw_content_detected"}),
    ],
)
def test_other_forms_of_results(result, images, extra):
    output = output_of(result)
    assert output.error is None
    assert len(output.images) == images
    assert set(output.extra) == extra
    pickle.dumps(output)


@pytest.mark.parametrize("result", [None, (), {}, {"images": None}])
def test_nothing_ends_the_request_alone(result):
    output = output_of(result)
    assert output.error is not None
    assert "Anything returned what cannot be read: nothing" in output.error


def test_results_that_cannot_be_sent_are_named():
    output = output_of({"images": [RED], "hook": lambda: None, "parts": [1, object()]})
    assert len(output.images) == 1
    assert output.extra == {"parts": [1]}
    assert output.metrics["warnings"] == [
        "hook, a function, cannot be sent and was left out of the output",
        "parts.1, a object, cannot be sent and was left out of the output",
    ]

    class Broken:
        @property
        def __dict__(self):
            raise RuntimeError("no")

    assert "RuntimeError: no" in (output_of(Broken()).error or "")


def test_views_are_sent_without_their_storage():
    whole = torch.zeros(1000, 1000)
    assert len(pickle.dumps(output_of({"embeds": whole[:1]}).extra["embeds"])) < 10_000
    latent = output_of({"frames": whole[None, :2], "audio": whole[None, :2, :2]}, output_type="latent")
    assert latent.latents.shape == (1, 2, 1000)
    assert latent.audio is None  # of latents nobody can hear anything
    assert latent.extra["audio"].shape == (1, 2, 2)


def test_a_server_gets_arrays():
    made = {"frames": torch.ones(1, 2, dtype=torch.bfloat16), "audio": TONE, "more": [torch.ones(1)]}
    output = with_arrays(output_of(made))
    assert [type(value) for value in (output.latents, output.audio, output.extra["more"][0])] == [np.ndarray] * 3
    assert b"torch" not in pickle.dumps(output)


ALL = {name: getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name}
CALLED = {
    name: signature_of(found)
    for name, found in ALL.items()
    if isinstance(found, type) and issubclass(found, DiffusionPipeline) and "__call__" in dir(found)
}


def test_every_pipeline_has_known_outputs():
    assert len(CALLED) > 250
    kinds = {name: takes.kinds for name, takes in CALLED.items()}
    silent = [name for name, takes in CALLED.items() if not takes.outputs]
    assert all("Combined" in name for name in silent)  # they hand on what another pipeline returns
    for name, expected in {
        "WanPipeline": ("video",),
        "StableVideoDiffusionPipeline": ("video",),
        "SanaVideoPipeline": ("video",),
        "LattePipeline": ("video",),
        "LTX2Pipeline": ("video", "audio"),
        "Cosmos3OmniPipeline": ("video", "audio"),
        "LTX2HDRPipeline": ("tensors",),
        "StableAudioPipeline": ("audio",),
        "MarigoldNormalsPipeline": ("image",),
        "KandinskyV22PriorPipeline": ("tensors",),
        "Kandinsky5T2IPipeline": ("image",),
        "LLaDA2Pipeline": ("text",),
        "UniDiffuserPipeline": ("image", "text"),
        "StableDiffusionPipeline": ("image",),
    }.items():
        assert kinds[name] == expected, name


@pytest.mark.parametrize("name", [name for name, takes in CALLED.items() if takes.rate_name])
def test_fps_reaches_the_pipeline(name):
    takes = CALLED[name]
    given = [each for each in takes.required if each not in ("prompt", "image", "generator")]
    fill = {each: [RED] if each in takes.images else 1 for each in given}
    call = {"extra_args": fill, **({"pil_image": RED} if takes.image_name else {})}
    call |= {"prompt": "a"} if "prompt" in takes.names else {}

    def built(**chosen):
        return build_requests(
            {**call, **chosen},
            OmniDiffusionSamplingParams(),
            prompt=None,
            negative_prompt=None,
            pil_image=None,
            overrides={},
            takes=takes,
        )[0]

    default = takes.defaults[takes.rate_name]
    told = built(fps=12.0)
    assert told.kwargs[takes.rate_name] == told.fps == 12
    assert type(told.kwargs[takes.rate_name]) is type(default)
    assert built().fps == default
    assert takes.rate_name not in built().kwargs
    if takes.rate_name != "fps":
        assert built(**{takes.rate_name: 9}).fps == 9.0


def test_our_parameter_names_hide_none_of_a_pipeline():
    """Every field with the name of a pipeline's argument reaches it, except those with the same meaning there."""
    fields = set(OmniDiffusionSamplingParams.__dataclass_fields__) - {"extra_args", "num_outputs_per_prompt"}
    assert {"seed", "fps", "height"} < fields
    for name, takes in CALLED.items():
        assert len(set(takes.choices)) == len(takes.choices), name
        assert fields & set(takes.names) <= set(takes.choices), name
        seeds = [each for each in takes.names if each.startswith("num_") and each.endswith("_per_prompt")]
        assert seeds == ([takes.count_name] if takes.count_name else []), name


def test_names_of_ours_that_pipelines_have():
    def kwargs(name, **chosen):
        takes = CALLED[name]
        call = {"prompt": "a", "seed": 5, **({"pil_image": RED} if takes.image_name else {}), **chosen}
        call["extra_args"] = {each: 1 for each in takes.required if each not in ("prompt", "image")}
        entry = build_requests(
            call, None, prompt=None, negative_prompt=None, pil_image=None, overrides={}, takes=takes
        )[0]
        return entry.kwargs

    assert kwargs("LTXI2VLongMultiPromptPipeline")["seed"] == 5
    assert "seed" not in kwargs("WanPipeline")
    assert kwargs("SanaVideoPipeline", num_frames=9)["frames"] == 9
    assert kwargs("LattePipeline", num_frames=9)["video_length"] == 9
    with pytest.raises(InputError, match="num_frames and frames disagree"):
        kwargs("SanaVideoPipeline", num_frames=9, frames=8)
    assert kwargs("LTXPipeline", fps=12)["frame_rate"] == 12
    assert kwargs("LTXPipeline", fps=12, frame_rate=12)["frame_rate"] == 12
    with pytest.raises(InputError, match="fps and frame_rate disagree"):
        kwargs("LTXPipeline", fps=12, frame_rate=10)
    assert kwargs("LTXConditionPipeline", strength=[0.5, 1.0])["strength"] == [0.5, 1.0]
    with pytest.raises(InputError, match=r"strength\[1\] must be at most 1"):
        kwargs("LTXConditionPipeline", strength=[0.5, 2.0])
    # Pictures where there are some; a pipeline's own form where it has no images, or refuses them.
    forms = ("WanPipeline", "StableAudioPipeline", "MarigoldDepthPipeline", "LLaDA2Pipeline", "TextToVideoZeroPipeline")
    assert [CALLED[name].form for name in forms] == ["pil", "pt", "np", "text", "pil"]


@pytest.mark.parametrize(
    "name",
    ["LTX2Pipeline", "StableAudioPipeline", "MarigoldDepthPipeline", "StableDiffusionXLPipeline", "LattePipeline"],
)
def test_the_source_tells_the_same(name):
    assert static_signature(name) == CALLED[name]


def test_a_class_of_ones_own():
    assert PipelineSignature("P", ("prompt", "num_frames")).kinds == ("video",)
    assert PipelineSignature("P", ("prompt",)).kinds == ("image",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Input type (float) and bias type (c10::BFloat16) should be the same", "(vae=bfloat16)"),
        (
            "Calculated padded input size per channel: (2 x 10). Kernel size: (3 x 3)",
            "(height 8): ask for a larger one",
        ),
        ("the list is empty", None),
    ],
)
def test_errors_of_libraries_come_with_what_to_change(text, words):
    asked = dataclasses.replace(
        request(), made_by={"dtype": {"vae": "bfloat16"}}, kwargs={"height": 8 if words else 512}
    )
    error = error_text(asked, RuntimeError(text))
    assert error.startswith(f"RuntimeError: {text}")
    assert (words in error) if words else error == f"RuntimeError: {text}"
    plain = dataclasses.replace(asked, made_by={"dtype": "bfloat16"}, kwargs={})
    assert error_text(plain, RuntimeError(text)) == f"RuntimeError: {text}"


def test_errors_of_tensors_come_with_their_shapes():
    kwargs = {"latents": torch.zeros(3), "prompt_embeds": [torch.zeros(1, 2)] * 2, "height": 512, "sigmas": [1.0]}
    asked = dataclasses.replace(request(), kwargs=kwargs)
    for error in (IndexError("tuple index out of range"), RuntimeError("size"), ValueError("no"), TypeError("x")):
        text = error_text(asked, error)
        assert text == f"{type(error).__name__}: {error}; given: latents (3,), prompt_embeds [(1, 2), (1, 2)]"
    assert error_text(asked, InputError("no")) == "no"
    assert error_text(asked, OSError("no file")) == "OSError: no file"


def test_long_warnings_are_cut():
    """A pipeline that cuts a prompt may repeat all of it."""
    with warnings_of("somebody", lambda: True) as heard:
        logging.getLogger("somebody").warning("cut: %s", "and on " * 2000)
    assert [len(line) for line in heard.lines] == [LONGEST_WARNING + 3]


def test_warnings_that_become_notes_are_not_printed():
    log, printed = logging.getLogger("somebody.else"), io.StringIO()
    handler = logging.StreamHandler(printed)
    log.addHandler(handler)
    turn = True
    with warnings_of("somebody.else", lambda: turn) as heard:
        log.warning("rounded")
        log.warning("rounded")
        turn = False
        log.warning("of another request")
    log.warning("later")
    assert heard.lines == ["rounded"]
    assert printed.getvalue().splitlines() == ["of another request", "later"]
    with contextlib.suppress(ValueError), warnings_of("somebody.else", lambda: True):
        log.warning("before it failed")
        raise ValueError
    log.removeHandler(handler)
    assert printed.getvalue().splitlines()[2:] == ["before it failed"]


def test_warnings_are_their_first_line_that_is_not_empty():
    with warnings_of("somebody", lambda: True) as heard:
        for text in (
            *("\nto use it: pip install x\nor else", "  \n", "", "first\nsecond"),
            *("you can install it:\n\npip install y\nor else", "nothing follows:\n"),
        ):
            logging.getLogger("somebody").warning(text)
    assert heard.lines == [
        *("to use it: pip install x", "first"),
        *("you can install it: pip install y", "nothing follows"),
    ]
