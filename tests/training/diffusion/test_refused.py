"""What cannot be trained is one line that says so, before anything is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shardit import InputError
from shardit.errors import UnsupportedError
from shardit.models import tiny
from tests.training.diffusion.folders import recipe_of, unet_folder


@pytest.mark.parametrize(
    ("name", "more", "text"),
    [
        ("longcat-image", {}, "LongCatImagePipeline cannot be trained; these can: WanPipeline, .*ZImagePipeline"),
        ("qwen-image-edit", {}, "QwenImageEditPipeline cannot be trained"),
        (
            "flux",
            {"train_text_encoder": True},
            "train_text_encoder: not with FluxPipeline, only with StableDiffusionXLPipeline and StableDiffusion",
        ),
        (
            "sdxl",
            {"train_text_encoder": True, "full": True},
            "train_text_encoder adds a LoRA, so it does not go with full",
        ),
        ("flux", {"dtype": "float16"}, "dtype='float16' loses small gradients: use bfloat16 or float32"),
        ("flux", {"output": None}, "output: name a folder for the run, or one for the cache"),
        ("flux", {"timesteps": "uniform", "shift": 2.0}, "shift=2 has no effect with timesteps='uniform'"),
        ("flux", {"lora_targets": ("to_q", "nothing")}, "lora_targets: 'nothing' matches no layer"),
        ("flux", {"resolution": "60x64"}, "resolution must have multiples of 16 as its sides, such as 64x64"),
        ("wan2.2-ti2v", {"resolution": "48x64"}, "resolution must have multiples of 32"),
        ("wan2.2-t2v", {"num_frames": 6}, "num_frames must be a number that the model takes, such as 5 or 9, got 6"),
        ("sdxl", {"timesteps": "shifted"}, "timesteps='shifted' needs a flow-matching model"),
        ("sdxl", {"shift": 3.0}, "shift=3 has no effect"),
    ],
)
def test_settings_that_do_not_fit(name: str, more: dict[str, Any], text: str, tmp_path: Path) -> None:
    given = {**more} if "output" in more else {"output": tmp_path, **more}
    output = given.pop("output")
    with pytest.raises(InputError, match=text) as caught:
        recipe_of(name, output, **given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def changed(source: str | Path, folder: Path, component: str, **config: Any) -> str:
    """Return a copy of a pipeline folder with another configuration of a component; "" is the index."""
    shutil.copytree(source, folder)
    file = next((folder / component).glob("*.json" if component else "model_index.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return str(folder)


def test_folders_of_other_kinds(tmp_path: Path) -> None:
    t2v = tiny.resolve("tiny/wan2.2-t2v")
    assert t2v is not None
    odd = changed(t2v, tmp_path / "odd", "", boundary_ratio=None)
    with pytest.raises(UnsupportedError, match="WanPipeline has transformer and transformer_2 but no boundary_ratio"):
        recipe_of("wan2.2-t2v", tmp_path, model=odd)
    edm = changed(
        unet_folder("sd"), tmp_path / "edm", "scheduler", prediction_type="epsilon", _class_name="EDMEulerScheduler"
    )
    index = tmp_path / "edm" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "EDMEulerScheduler"))
    with pytest.raises(UnsupportedError, match="EDMEulerScheduler with no alphas_cumprod cannot be trained"):
        recipe_of("sd", tmp_path, model=edm)
