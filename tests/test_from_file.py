"""Files that are to be made again: what they hold, and what cannot be had from them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from shardit.cli import main
from shardit.errors import InputError
from shardit.flags import GenerateFlags
from shardit.from_file import differences, flags_of, read_record
from shardit.output import Output

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


def test_what_a_file_does_not_hold(tmp_path):
    with pytest.raises(InputError, match="made with latents given as numbers"):
        flags_of({"latents": "Tensor(1, 4)"}, [])
    pictures = saved(tmp_path / "a.png", input_image_sizes=[[8, 8]])
    with pytest.raises(InputError, match=r"made from input pictures.*add --image"):
        GenerateFlags(from_file=pictures).completed()
    Image.new("RGB", (4, 4)).save(tmp_path / "strange.png")
    (tmp_path / "text.mp4").write_text("x")
    for name in ("strange.png", "text.mp4"):
        with pytest.raises(InputError, match="does not say how it was made"):
            read_record(tmp_path / name)
    with pytest.raises(InputError, match="there is no file"):
        read_record(tmp_path / "none.png")


def test_other_versions_are_told():
    here = {"torch": "2.0", "diffusers": "1.0"}
    assert differences({"versions": {"torch": "1.0", "diffusers": "1.0"}}, here) == [
        "the file was made with torch 1.0, here is 2.0: pixels may differ"
    ]


def test_no_model_is_named(capsys):
    assert main(["generate", "--prompt", "a"]) == 2
    assert capsys.readouterr().err == "error: --model is missing: name a hub id, a diffusers folder or tiny/NAME\n"
