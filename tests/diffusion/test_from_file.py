"""Repeating a request from a saved file: the settings in the file, and those that are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardit.cli import main
from shardit.config import DiffusionParallelConfig
from shardit.diffusion.output.from_file import (
    check_fits,
    check_model_is_local,
    differences,
    flags_of,
    other_images,
    other_revision,
    read_record,
)
from shardit.diffusion.output.output import Output
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.engine.nodes.revision import revision_of
from shardit.engine.session_spec import session_spec
from shardit.engine.tasks.loaded_signature import _made_by
from shardit.errors import InputError
from shardit.flags import GenerateFlags
from shardit.settings.model_options import NO_OPTIONS, model_options, recorded

SETTINGS = {
    "model": "tiny/flux",
    "dtype": {"transformer": "bfloat16"},
    "versions": {"torch": "1.0"},
    "width": 64,
    "strength": 0.5,
    "caption": "x",
    "num_outputs_per_prompt": 2,
}


def saved(path, **more):
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    frames = {"frames": [[picture] * 2]} if path.suffix == ".mp4" else {"images": [picture]}
    (written,) = Output(prompt="a", seed=3, settings={**SETTINGS, **more}, **frames).save(path)
    return written


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".mp4"])
def test_flags_of_a_file(tmp_path, suffix):
    flags = GenerateFlags(from_file=saved(tmp_path / f"x{suffix}"), width=32).completed()
    assert (flags.model, flags.prompt, flags.seed, flags.width) == ("tiny/flux", "a", 3, 32)
    assert (flags.dtype, flags.num_outputs_per_prompt) == ("transformer=bfloat16", 2)
    params = flags.sampling_params()
    assert (params.strength, params.extra_args["caption"]) == (0.5, "x")


def test_a_flag_turns_off_a_switch_of_the_file(tmp_path):
    made = saved(tmp_path / "x.png", vae_tiling=True, vae_slicing=True)
    flags = GenerateFlags(from_file=made, vae_tiling=False).completed()
    assert flags.model_options() == model_options(vae_slicing=True)


def test_input_pictures_of_another_size_are_noted():
    record = {"input_image_sizes": [[160, 128]]}
    assert other_images(record, [(160, 128)]) == []
    assert other_images({}, []) == []
    assert other_images(record, [(320, 256), (8, 8)]) == [
        "the file was made from input images of 160x128, here: 320x256, 8x8: the result will differ"
    ]


def test_a_file_of_another_model(tmp_path, capsys):
    path = saved(tmp_path / "a.png", strength=None, true_cfg_scale=2.0)
    assert main(["generate", "--from-file", str(path), "--model", "tiny/wan2.2-t2v"]) == 2
    assert capsys.readouterr().err == (
        f"error: {path} was made by tiny/flux with caption, true_cfg_scale, which WanPipeline does not take; "
        "leave --model out, or give the settings as flags in place of --from-file\n"
    )
    takes = PipelineSignature("P", ("prompt", "width"))
    check_fits(path, "tiny/other", ["width", "height"], takes)
    check_fits(path, "tiny/flux", ["true_cfg_scale"], takes)


def test_values_that_a_file_does_not_contain(tmp_path):
    with pytest.raises(InputError, match="made with latents given as numbers"):
        flags_of({"latents": "Tensor(1, 4)"}, [])
    pictures = saved(tmp_path / "a.png", input_image_sizes=[[8, 8]])
    with pytest.raises(InputError, match=r"made from input images.*add --image"):
        GenerateFlags(from_file=pictures).completed()
    Image.new("RGB", (4, 4)).save(tmp_path / "strange.png")
    (tmp_path / "text.mp4").write_text("x")
    for name in ("strange.png", "text.mp4"):
        with pytest.raises(InputError, match="does not say how it was made"):
            read_record(tmp_path / name)
    with pytest.raises(InputError, match="there is no file"):
        read_record(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("picture 64x32", r"mask_image given as an image, which it does not hold; add --extra mask_image=PATH"),
        ("3 pictures 64x32", "mask_image given as images"),
        (["ndarray(2, 3)", None], "mask_image given as numbers"),
        ({"a": "Parameter()"}, "mask_image given as numbers"),
    ],
)
def test_pictures_and_tensors_must_be_given_again(tmp_path, value, words):
    path = saved(tmp_path / "a.png", mask_image=value)
    with pytest.raises(InputError, match=words):
        GenerateFlags(from_file=path).completed()
    flags = GenerateFlags(from_file=path, extra=["mask_image=mask.png"]).completed()
    assert flags.extra_arguments()["mask_image"] == "mask.png"


def test_a_prompt_may_read_like_a_picture():
    record = {"prompt": "picture 5x5 of Tensor(1) things", "negative_prompt": "Tensor(s)"}
    assert flags_of(record, record) == (record, {})


def test_model_options_are_restored_from_a_file(tmp_path):
    for name in ("lora.safetensors", "part.safetensors", "whole.safetensors"):
        (tmp_path / name).touch()
    options = model_options(
        variant="fp16",
        scheduler="UniPCMultistepScheduler",
        scheduler_args={"use_karras_sigmas": True, "name": "x"},
        flow_shift=3.0,
        lora=[(str(tmp_path / "lora.safetensors"), 0.5), {"path": "me/style", "weight_name": "a.safetensors"}],
        vae_tiling=True,
        single_files={"transformer": tmp_path / "part.safetensors"},
    )
    flags = GenerateFlags(from_file=saved(tmp_path / "a.png", **recorded(options))).completed()
    assert flags.model_options() == options
    assert (flags.model, flags.config, flags.extra) == ("tiny/flux", None, ['caption="x"', "strength=0.5"][::-1])
    other = GenerateFlags(from_file=saved(tmp_path / "a.png", **recorded(options)), flow_shift=2.0).completed()
    assert (other.model_options().flow_shift, other.scheduler) == (2.0, "UniPCMultistepScheduler")

    whole = model_options(single_files={"*": tmp_path / "whole.safetensors"})
    flags = GenerateFlags(from_file=saved(tmp_path / "b.png", **recorded(whole))).completed()
    assert (flags.model, flags.config) == (str(tmp_path / "whole.safetensors"), "tiny/flux")


def test_no_access_token_is_recorded():
    assert recorded(model_options(lora={"path": "me/style", "token": "secret"})) == {
        "lora": [{"path": "me/style", "scale": 1.0}]
    }


def test_explicit_default_flags_override_a_file(tmp_path):
    flags = GenerateFlags(from_file=saved(tmp_path / "a.png"), num_outputs_per_prompt=1).completed()
    assert flags.sampling_params().num_outputs_per_prompt == 1


def test_steps_given_in_any_form_override_those_of_a_file(tmp_path):
    listed = saved(tmp_path / "a.png", sigmas=[0.9], num_inference_steps=1)
    assert GenerateFlags(from_file=listed).completed().extra_arguments()["sigmas"] == [0.9]
    flags = GenerateFlags(from_file=listed, num_inference_steps=2).completed()
    assert (flags.num_inference_steps, "sigmas" in flags.extra_arguments()) == (2, False)
    flags = GenerateFlags(
        from_file=saved(tmp_path / "b.png", num_inference_steps=4), extra=["sigmas=[0.9]"]
    ).completed()
    assert (flags.num_inference_steps, flags.extra_arguments()["sigmas"]) == (None, [0.9])


def test_a_record_without_a_model(tmp_path):
    with pytest.raises(InputError, match="does not say of which model it was made"):
        GenerateFlags(from_file=saved(tmp_path / "a.png", model=None)).completed()


def made_by(**made_by):
    return PipelineSignature("P", (), made_by=made_by)


def test_another_pipeline_is_noted():
    assert other_revision({"pipeline": "P"}, made_by()) == []
    assert other_revision({"pipeline": "Q"}, made_by()) == ["the file was made by Q, here is P: it will differ"]
    wan = PipelineSignature("WanPipeline", (), native_fps=24.0)
    for name in ("WanPipeline", "WanImageToVideoPipeline"):  # with a picture
        assert other_revision({"pipeline": name}, wan) == []


def test_another_revision_is_noted():
    assert other_revision({"revision": "a"}, made_by(revision="a")) == []
    assert other_revision({}, made_by(revision="a")) == []
    assert other_revision({"revision": "a"}, made_by(revision="b")) == [
        "the file was made with revision a of the model, here is b: pixels may differ"
    ]
    files = {"a.safetensors": "1", "gone.safetensors": "2"}
    assert other_revision({"file_revisions": files}, made_by(file_revisions=files)) == []
    assert other_revision({"file_revisions": files}, made_by(file_revisions={"a.safetensors": "3"})) == [
        "a.safetensors has changed since the file was made: pixels may differ"
    ]


def test_files_of_adapters_and_components_are_recorded(tmp_path):
    """By their content, large ones by pieces of it."""
    path = tmp_path / "part.safetensors"
    path.write_bytes(bytes(3 << 20))
    options = model_options(lora=[str(path), "me/style"], single_files={"transformer": path})
    spec = session_spec("tiny/flux", DiffusionParallelConfig(), options, "unused")
    before = _made_by(spec)["file_revisions"]
    assert list(before) == [str(path)]
    path.write_bytes(b"x" * (3 << 20))
    assert _made_by(spec)["file_revisions"] != before
    assert "file_revisions" not in _made_by(session_spec("tiny/flux", DiffusionParallelConfig(), NO_OPTIONS, "unused"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(bytes(3 << 20))
    revision = revision_of(tmp_path / "model")
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"x" * (3 << 20))
    assert revision_of(tmp_path / "model") != revision is not None
    assert flags_of({"file_revisions": before, "prompt": "x"}, ["prompt"]) == ({"prompt": "x"}, {})


def test_other_versions_are_noted():
    here = {"torch": "2.0", "diffusers": "1.0"}
    assert differences({"versions": {"torch": "1.0", "diffusers": "1.0"}}, here) == [
        "the file was made with torch 1.0, here is 2.0: pixels may differ"
    ]


def test_no_model_is_named(capsys):
    assert main(["generate", "--prompt", "a"]) == 2
    assert capsys.readouterr().err == "error: --model is missing: name a hub id, a diffusers folder or tiny/NAME\n"


def test_a_model_folder_that_is_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {"model": "my-folder", "revision": "0" * 64}
    with pytest.raises(InputError, match=r"a.png was made by the model in the folder my-folder, which is not here"):
        check_model_is_local(Path("a.png"), record)
    check_model_is_local(Path("a.png"), {**record, "revision": "0" * 40})
    (tmp_path / "my-folder").mkdir()
    check_model_is_local(Path("a.png"), record)


@pytest.mark.parametrize("text", ["picture 64x64", "2 pictures 8x8", "Tensor(1, 2)"])
def test_prompts_are_no_placeholders(tmp_path, text):
    path = saved(tmp_path / "x.png", prompt=text, negative_prompt=text, prompt_2=text)
    flags = GenerateFlags(from_file=path).completed()
    assert (flags.prompt, flags.negative_prompt) == (text, text)
    assert f'prompt_2="{text}"' in flags.extra


def test_null_for_an_argument_with_another_default(tmp_path):
    path = saved(tmp_path / "x.png", complex_human_instruction=None, variant=None)
    assert GenerateFlags(from_file=path).completed().sampling_params().extra_args == {
        "complex_human_instruction": None,
        "caption": "x",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("single_files", value) for value in ("x", 5, ["x"])],
        *[("scheduler_args", value) for value in ("x", [1], 5)],
        *[("versions", value) for value in ("x", ["a"], 5)],
        *[("model", value) for value in (5, {}, ["tiny/flux"])],
        *[
            ("input_image_sizes", 5),
            ("layer_partition", 5),
            ("extra", ["a=1"]),
            ("from_file", "x"),
            ("output", "x.png"),
        ],
    ],
)
def test_edited_records(tmp_path, name, value):
    with pytest.raises(InputError, match=rf"its record was edited \({name}\); give the settings as flags"):
        read_record(saved(tmp_path / "x.png", **{name: value}))


def test_nulls_of_a_record_are_nothing(tmp_path):
    nulls = dict.fromkeys(("single_files", "scheduler_args", "versions", "input_image_sizes"))
    path = saved(tmp_path / "x.png", **nulls)
    assert not nulls.keys() & read_record(path).keys()
    assert GenerateFlags(from_file=path).completed().model == "tiny/flux"


def test_a_prompt_that_a_jpeg_has_no_room_for(tmp_path):
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    output = Output(prompt="雨" * 11_000, seed=3, settings={**SETTINGS, "negative_prompt": "y" * 100}, images=[picture])
    assert output.left_out(tmp_path / "x.png") == []
    assert output.left_out(tmp_path / "x.jpg") == ["prompt"]
    (path,) = output.save(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="the file had no room for prompt; add --prompt"):
        GenerateFlags(from_file=path).completed()
    flags = GenerateFlags(from_file=path, prompt="z").completed()
    assert (flags.model, flags.prompt, flags.seed, flags.width) == ("tiny/flux", "z", 3, 64)
    assert flags.negative_prompt == "y" * 100


def test_an_argument_of_the_name_parallel(tmp_path):
    path = saved(tmp_path / "x.png", parallel=2)
    assert "parallel=2" in GenerateFlags(from_file=path).completed().extra
    path = saved(tmp_path / "y.png", parallel={"pipeline_parallel_size": 2}, ranks={"pipeline_parallel_size": 2})
    assert not any("parallel" in one or "ranks" in one for one in GenerateFlags(from_file=path).completed().extra)


def test_flags_override_what_a_record_says_under_other_names(tmp_path):
    settings = {"single_files": {"*": "a.safetensors"}, "scheduler_args": {"shift": 3.0}}
    path = saved(tmp_path / "x.png", **settings, scheduler="A")
    flags = GenerateFlags(from_file=path, model="tiny/flux", scheduler_arg=["shift=5"], scheduler="B").completed()
    assert (flags.model, flags.scheduler_arg, flags.scheduler) == ("tiny/flux", ["shift=5"], "B")
    flags = GenerateFlags(from_file=path).completed()
    assert (flags.model, flags.config) == ("a.safetensors", "tiny/flux")
    assert flags.scheduler_arg == ["shift=3.0"]


def test_flags_override_the_other_names_of_a_setting():
    record = {"frame_rate": 24.0, "fps": 24.0, "video_length": 16, "prompt": "a cat"}
    assert flags_of(record, ["fps", "prompt"], ["fps", "num_frames"]) == ({"prompt": "a cat"}, {})
    assert flags_of(record, ["fps", "prompt"], ["frame_rate"])[0] == {"prompt": "a cat"}


@pytest.mark.parametrize(("suffix", "package"), [(".mp4", "av"), (".safetensors", "safetensors")])
def test_a_reader_that_is_not_installed(tmp_path, monkeypatch, suffix, package):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        read_record(path)
