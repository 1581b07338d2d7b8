"""Samples are those of the plain pipeline with the same weights; making them changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shardit import InputError
from shardit.models import tiny
from shardit.training.data.shapes import drawing
from shardit.training.diffusion import samples
from tests.support.ranks import run_ranks
from tests.training.diffusion.folders import FIRST_FRAME, model_of, recipe_of, samples_of, stir
from tests.training.diffusion.runs import raw_video, sampled

PROMPTS = ("a red cat on a boat", "")


def pixels_of(path: str | Path) -> np.ndarray:
    """The pixels of a sample; of a video what `raw_video` has written."""
    path = Path(path)
    return np.asarray(Image.open(path)) if path.suffix == ".png" else np.load(path.open("rb"))


@pytest.mark.parametrize("name", ["flux", "qwen-image", "sdxl", "z-image", "sd3.5"])
def test_a_sample_is_that_of_the_plain_pipeline(name: str, tmp_path: Path) -> None:
    made = recipe_of(name, tmp_path, sample_prompts=PROMPTS, seed=3)
    files = samples_of(made, tmp_path / "samples")
    assert [path.name for path in files] == ["0.png", "1.png"]
    pipe: Any = tiny.load_plain(tiny.resolve(model_of(name)) or model_of(name))
    pipe.set_progress_bar_config(disable=True)
    call = tiny.filled_in(name, ()) if name in tiny.names() else {}
    call.update({"width": 64, "height": 64 if name == "sdxl" else 96})
    if name == "qwen-image":
        call["negative_prompt"] = " "
    for number, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(3 + number)
        expected = pipe(prompt=prompt, generator=generator, **call).images[0]
        assert np.array_equal(pixels_of(files[number]), np.asarray(expected)), prompt


def test_a_sample_with_a_given_first_frame_is_that_of_the_plain_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "write_video", raw_video)
    made = recipe_of(FIRST_FRAME, tmp_path, sample_prompts=PROMPTS[:1], seed=3)
    (file,) = samples_of(made, tmp_path / "samples")
    pipe: Any = tiny.load_plain(model_of(FIRST_FRAME))
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(drawing(0, kind="moving").frames(64, 96, 5)[0])
    size = {"width": 64, "height": 96, "num_frames": 5}
    generator = torch.Generator().manual_seed(3)
    expected = pipe(image=image, prompt=PROMPTS[0], generator=generator, output_type="pil", **size).frames[0]
    assert np.array_equal(pixels_of(file), np.stack([np.asarray(frame) for frame in expected]))


def test_text_encoders_that_are_trained_make_samples(tmp_path: Path) -> None:
    made = [recipe_of("sdxl", tmp_path, sample_prompts=PROMPTS[:1], train_text_encoder=live) for live in (False, True)]
    (plain,), (live,) = (samples_of(one, tmp_path / str(n)) for n, one in enumerate(made))
    assert np.array_equal(pixels_of(plain), pixels_of(live))
    stir(made[1].models["unet"])
    (changed,) = samples_of(made[1], tmp_path / "changed")
    assert not np.array_equal(pixels_of(plain), pixels_of(changed))


@pytest.mark.parametrize("name", ["wan2.2-t2v", "wan2.2-i2v"])
def test_looking_changes_nothing(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    given = {"sample_prompts": PROMPTS[:1], "lora_dropout": 0.3, "gradient_checkpointing": True}
    made = recipe_of(name, tmp_path, **given)
    for model in made.models.values():
        stir(model)
    batch = made.micro_batches(0, 0, 1)[0]
    torch.manual_seed(1)
    made.loss(made.models[batch.model], batch.data).backward()

    def state() -> Any:
        parameters = [p for model in made.models.values() for p in model.parameters()]
        modes = [module.training for model in made.models.values() for module in model.modules()]
        grads = [None if p.grad is None else p.grad.clone() for p in parameters]
        weights = [p.detach().clone() for p in parameters]
        data = [one.data for one in made.micro_batches(5, 0, 1)]
        return weights, grads, modes, torch.get_rng_state(), data

    monkeypatch.setattr(samples, "write_video", raw_video)
    before = state()
    (file,) = samples_of(made, tmp_path / "one")
    (again,) = samples_of(made, tmp_path / "two")
    assert pixels_of(file).shape == (5, 96, 64, 3)
    assert np.array_equal(pixels_of(file), pixels_of(again))
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert any(before[2])


def test_samples_over_two_stages_are_those_of_one_rank(tmp_path: Path) -> None:
    of_ranks = run_ranks(2, sampled, "wan2.2-t2v", str(tmp_path / "two"), 2, timeout=100)
    assert of_ranks[0] == of_ranks[1]
    (alone,) = run_ranks(1, sampled, "wan2.2-t2v", str(tmp_path / "one"), 1, timeout=100)
    for two, one in zip(of_ranks[0], alone, strict=True):
        assert pixels_of(two).shape == (5, 96, 64, 3)
        assert np.abs(pixels_of(two).astype(int) - pixels_of(one)).max() <= 1


def test_samples_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sample_every needs sample_prompts"):
        recipe_of("flux", tmp_path, sample_every=2)


def test_held_out_batches_stay(tmp_path: Path) -> None:
    made = recipe_of("flux", tmp_path, validation_data="shapes:still:5", batch_size=2, caption_dropout=0.9)
    assert made.held_out is not None
    one, other = made.held_out(), made.held_out()
    assert sorted(item for batch in one for item in batch.items) == [f"still-{n:07}" for n in range(5)]
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first.data, second.data, rtol=0, atol=0)
    assert recipe_of("flux", tmp_path).held_out is None


def test_a_video_is_written_as_one(tmp_path: Path) -> None:
    import av

    made = recipe_of("wan2.2-ti2v", tmp_path, sample_prompts=PROMPTS[:1], fps=8.0)
    (file,) = samples_of(made, tmp_path / "samples")
    with av.open(str(file)) as container:
        assert container.streams.video[0].average_rate == 8
        assert len(list(container.decode(video=0))) == 5
