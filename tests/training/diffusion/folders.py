"""Pipelines that are trained in tests, their settings, and their recipes."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.mesh import Mesh, axis_sizes
from shardit.models import tiny
from shardit.training.diffusion.recipe import recipe
from shardit.training.evaluation import evaluation_mode
from shardit.training.recipe import TrainingRecipe
from shardit.training.settings import TrainSettings
from tests.pipelines import parts
from tests.pipelines.of_stable_diffusion_base import components
from tests.pipelines.of_stable_diffusion_xl import xl, xl_unet

TINY = ("wan2.2-ti2v", "wan2.2-t2v", "wan2.2-i2v", "flux", "sd3.5", "qwen-image", "z-image")
UNETS = ("sd", "sdxl", "sdxl-v")
"""sd and sdxl predict the noise, sdxl-v the velocity."""
FIRST_FRAME = "wan2.2-ti2v-i2v"
"""TI2V as image to video: the first latent frame is given, and each token has a timestep of its own."""
NAMES = (*TINY, FIRST_FRAME, *UNETS)


@functools.cache
def unet_folder(name: str) -> str:
    """Return the folder of a tiny pipeline with a UNet."""
    prediction = "v_prediction" if name == "sdxl-v" else "epsilon"
    folder = Path(tempfile.mkdtemp(prefix=f"shardit-{name}-"))
    if name == "sd":
        pipe = parts.pipeline("StableDiffusionPipeline", **components())
    else:
        pipe = xl("StableDiffusionXLPipeline", unet=xl_unet())
    pipe.save_pretrained(folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": prediction}))
    return str(folder)


@functools.cache
def first_frame_folder() -> str:
    """Return the folder of TI2V with the pipeline of image to video."""
    folder = Path(tempfile.mkdtemp(prefix=f"shardit-{FIRST_FRAME}-")) / "model"
    shutil.copytree(str(tiny.resolve("tiny/wan2.2-ti2v")), folder)
    index = folder / "model_index.json"
    none = {"image_encoder": [None, None], "image_processor": [None, None]}
    own = json.loads(index.read_text())
    index.write_text(json.dumps({**own, "_class_name": "WanImageToVideoPipeline", **none}))
    return str(folder)


def model_of(name: str) -> str:
    """Return the model of a name: a tiny one, or a folder."""
    if name == FIRST_FRAME:
        return first_frame_folder()
    return unet_folder(name) if name in UNETS else f"tiny/{name}"


def settings_of(name: str, output: Path | str | None, model: str = "", **more: Any) -> TrainSettings:
    """Return settings for a few drawn items of a small size."""
    moving = name.startswith("wan")
    given: dict[str, Any] = {
        "model": model or model_of(name),
        "data": "shapes:moving:4" if moving else "shapes:still:4",
        "output": None if output is None else Path(output),
        "resolution": "64x64" if name in UNETS else "64x96",
        "lora_rank": 4,
        **({"num_frames": 5} if moving else {}),
    }
    return TrainSettings(**{**given, **more})


def alone() -> Mesh:
    """Return the mesh of one rank, whatever process group there is."""
    place = torch.device("cpu")
    group = GroupCoordinator(0, (0,), place, timedelta(seconds=60))
    return Mesh(axis_sizes(DiffusionParallelConfig()), 0, place, group.timeout, group, group, group)


def recipe_of(name: str, output: Path | str | None, **more: Any) -> TrainingRecipe:
    """Return the recipe of one rank."""
    return recipe(settings_of(name, output, **more), alone())


def samples_of(made: TrainingRecipe, folder: Path) -> list[Path]:
    """Write samples as a run does; return their files."""
    assert made.sample is not None
    with evaluation_mode(made.models, torch.device("cpu")):
        return made.sample(made.models, folder)


def stir(model: Any) -> None:
    """Give an adapter weights that are not zero, the same on each rank."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(number)
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
