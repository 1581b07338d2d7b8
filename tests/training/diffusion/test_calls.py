"""The model is called as its pipeline calls it: the same prediction for the same latents, prompt and timestep."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from shardit.models import tiny
from shardit.training.data.shapes import Drawing, drawing
from shardit.training.diffusion.families.predictions import Inputs
from tests.training.diffusion.folders import NAMES, model_of, recipe_of

NO_GUIDANCE = {"ZImagePipeline": {"guidance_scale": 0.0}, "QwenImagePipeline": {"true_cfg_scale": 1.0}}


class _Stopped(Exception):
    """The pipeline has stepped once."""


def drawn(item: str) -> Drawing:
    """The drawing behind a name of an item."""
    kind, _, number = item.partition("-")
    return drawing(int(number), kind=kind)


def first_step(pipe: Any, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the timestep of a pipeline's first step and the prediction that its scheduler gets."""
    found: list[Any] = []

    def step(prediction: torch.Tensor, time: Any, *_: Any, **__: Any) -> None:
        found.extend((torch.as_tensor(time).float().view(1), prediction))
        raise _Stopped

    pipe.scheduler.step = step
    with pytest.raises(_Stopped):
        pipe(num_inference_steps=4, output_type="latent", **call)
    return found[0], found[1]


def flat(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents in the layout of the pipeline's call."""
    if not hasattr(pipe, "_pack_latents"):
        return latents
    latents = latents[:, :, 0] if latents.dim() == 5 else latents
    return pipe._pack_latents(latents, *latents.shape)


def call_of(pipe: Any, name: str, latents: torch.Tensor, item: str) -> dict[str, Any]:
    """The arguments of a call of the pipeline for an item of the data, without guidance."""
    scale = getattr(pipe, "vae_scale_factor_spatial", None) or pipe.vae_scale_factor
    height, width = (side * scale for side in latents.shape[-2:])
    call = {
        "prompt": drawn(item).caption,
        "latents": flat(pipe, latents),
        "height": height,
        "width": width,
        "max_sequence_length": tiny.defaults(name).get("max_sequence_length") if name in tiny.names() else None,
        **NO_GUIDANCE.get(type(pipe).__name__, {"guidance_scale": 1.0}),
    }
    if name.startswith("wan"):
        call["num_frames"] = 5
    if name.endswith("i2v"):
        call["image"] = Image.fromarray(drawn(item).frames(width, height, 5)[0])
    takes = inspect.signature(type(pipe).__call__).parameters
    return {key: value for key, value in call.items() if key in takes and value is not None}


@pytest.mark.parametrize("name", NAMES)
def test_the_prediction_is_that_of_the_pipeline(name: str, tmp_path: Path) -> None:
    made = recipe_of(name, tmp_path, full=True)
    batch, loss = made.micro_batches(0, 0, 1)[0], made.loss
    model: Any = next(iter(made.models.values())).eval()
    pipe: Any = tiny.load_plain(tiny.resolve(model_of(name)) or model_of(name))
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(batch.data["latents"].shape, generator=torch.Generator().manual_seed(3))
    time, expected = first_step(pipe, **call_of(pipe, name, latents, batch.items[0]))
    if name.startswith("sdxl"):
        latents = latents * pipe.scheduler.init_noise_sigma / (pipe.scheduler.sigmas[0] ** 2 + 1) ** 0.5
    given = Inputs(latents, time, batch.data["text"], batch.data["condition"], type(pipe), loss.settings)  # type: ignore
    with torch.no_grad():
        predict: Any = loss.family.predict  # type: ignore
        got = flat(pipe, predict(model, given))
        other = flat(pipe, predict(model, dataclasses.replace(given, times=time / 2)))
    torch.testing.assert_close(got, expected.reshape(got.shape), rtol=1e-5, atol=1e-5)
    assert (other - got).abs().max() > 1e-4  # the timestep counts
