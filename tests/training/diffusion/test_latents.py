"""Latents are those that the pipeline decodes; prompts of several lengths in one batch are as each alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardit.errors import UnsupportedError
from shardit.models import tiny
from shardit.training.diffusion.components import prepare_parts
from shardit.training.diffusion.families.latents import NORMALISED, check_vae, encoded
from shardit.training.diffusion.families.table import FAMILIES
from tests.training.diffusion.folders import FIRST_FRAME, NAMES, alone, model_of, recipe_of, settings_of
from tests.training.diffusion.test_calls import call_of, flat


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_decodes_what_was_encoded(name: str, tmp_path: Path) -> None:
    """Latents that go into a pipeline's decoding come out as the VAE's own decoding of its own encoding."""
    pipe: Any = tiny.load_plain(tiny.resolve(model_of(name)) or model_of(name))
    pipe.set_progress_bar_config(disable=True)
    moving = name.startswith("wan")
    pixels = torch.rand(3, *([5] if moving else []), 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = encoded(pipe.vae, pixels)[None]
    pipe.scheduler.step = lambda *_, **__: (flat(pipe, latents),)
    call = {**call_of(pipe, name, latents, "moving-0000000"), "output_type": "pt", "num_inference_steps": 1}
    if name == FIRST_FRAME:  # takes the place of the first latent frame
        call["image"] = pixels[None, :, 0] / 2 + 0.5
    made = pipe(**call)
    got = made.frames[0] if moving else made.images[0]
    with torch.no_grad():
        given = pixels[None] if moving or type(pipe.vae).__name__ == "AutoencoderKL" else pixels[None, :, None]
        expected = pipe.vae.decode(pipe.vae.encode(given).latent_dist.mode()).sample[0]
    expected = expected.transpose(0, 1) if moving else expected.reshape(3, 64, 64)
    torch.testing.assert_close(got, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    raw = pipe.vae.encode(given).latent_dist.mode()
    assert (latents.reshape(raw.shape) - raw).abs().max() > 1e-2  # they are normalised


def test_a_vae_without_an_entry_is_refused() -> None:
    from diffusers import AutoencoderTiny

    with pytest.raises(UnsupportedError, match="AutoencoderTiny cannot be trained with; these VAEs can: AutoencoderKL"):
        check_vae(AutoencoderTiny())
    assert len(NORMALISED) == 3


@pytest.mark.parametrize("name", ["qwen-image", "z-image", "flux"])
def test_prompts_of_several_lengths_in_a_batch(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    from PIL import Image

    for number, caption in enumerate(("red", "a small red cat on a boat in the dark fog", "a cat")):
        Image.new("RGB", (64, 64), (80 * number, 10, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    given = {"data": str(folder), "resolution": "64x64"}
    together = recipe_of(name, tmp_path / "a", **given, batch_size=3, accumulation=1, full=True)
    single = recipe_of(name, tmp_path / "b", **given, batch_size=1, accumulation=3, full=True)
    (batch,), singles = together.micro_batches(0, 0, 1), single.micro_batches(0, 0, 1)
    assert sorted(batch.items) == sorted(one.items[0] for one in singles)
    model = together.models["transformer"].eval()
    with torch.no_grad():
        mean = sum(float(together.loss(model, one.data)) for one in singles) / 3
        assert float(together.loss(model, batch.data)) == pytest.approx(mean, rel=2e-6)
    assert batch.weight == 3


def test_every_family_of_the_table_is_tested(tmp_path: Path) -> None:
    tested = {
        prepare_parts(settings_of(name, tmp_path), torch.device("cpu"), alone().replica).family.pipeline
        for name in NAMES
    }
    assert {one.pipeline for one in FAMILIES} == tested
