"""Micro-batches: what replicas draw, what short batches weigh, what a step depends on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from shardit import InputError
from shardit.diffusion.output.encode import write_video
from tests.training.diffusion.folders import FIRST_FRAME, recipe_of, stir
from tests.training.diffusion.runs import accumulated
from tests.training.models import worst


def drawn(batches: list[Any]) -> list[tuple[str, int, float]]:
    """Item, seed and timestep of every sample."""
    return [
        (item, int(seed), float(time))
        for one in batches
        for item, seed, time in zip(one.items, one.data["seeds"], one.data["times"], strict=True)
    ]


@pytest.mark.parametrize("name", ["flux", "wan2.2-t2v"])
def test_replicas_draw_what_one_rank_draws(name: str, tmp_path: Path) -> None:
    """Two replicas with two micro-batches: four noises and timesteps, those of one rank with four."""
    data = "shapes:moving:9" if name.startswith("wan") else "shapes:still:9"
    two = recipe_of(name, tmp_path, data=data, accumulation=2)
    one = recipe_of(name, tmp_path, data=data, accumulation=4)
    for step in range(3):
        parts = [drawn(two.micro_batches(step, replica, 2)) for replica in range(2)]
        together = parts[0] + parts[1]
        assert together == drawn(one.micro_batches(step, 0, 1))
        assert len({seed for _, seed, _ in together}) == len({time for _, _, time in together}) == 4
    assert two.steps_per_epoch == 4.5


def test_a_sample_draws_anew_in_each_epoch_and_alike_in_any_batch(tmp_path: Path) -> None:
    single = recipe_of("flux", tmp_path, data="shapes:still:3", accumulation=3)
    pairs = recipe_of("flux", tmp_path, data="shapes:still:3", batch_size=2, accumulation=2)
    first, second = ({i: (s, t) for i, s, t in drawn(single.micro_batches(step, 0, 1))} for step in range(2))
    assert first.keys() == second.keys()
    assert all(first[item] != second[item] for item in first)
    assert {item: (seed, time) for item, seed, time in drawn(pairs.micro_batches(0, 0, 1))} == first


def test_a_batch_of_three_is_two_and_one(tmp_path: Path) -> None:
    """Gradients and loss are the mean over samples, however they are batched."""
    whole = recipe_of("flux", tmp_path, data="shapes:still:3", batch_size=3, accumulation=1)
    split = recipe_of("flux", tmp_path, data="shapes:still:3", batch_size=2, accumulation=2)
    model = whole.models["transformer"]
    stir(model)
    other = copy.deepcopy(model)
    batches = split.micro_batches(0, 0, 1)
    assert sorted(one.weight for one in batches) == [1, 2]
    expected = accumulated(whole.loss, model, whole.micro_batches(0, 0, 1))
    assert accumulated(split.loss, other, batches) == pytest.approx(expected, rel=2e-6)
    largest, compared, only = worst(other.named_parameters(), model)
    assert largest < 5e-6
    assert compared == 112
    assert only == []
    other.zero_grad()
    for one in batches:  # without weights it is another mean
        (split.loss(other, one.data) / 2).backward()
    assert worst(other.named_parameters(), model)[0] > 1e-2


def test_a_dropped_caption_is_the_empty_prompt(tmp_path: Path) -> None:
    data = {"data": "shapes:still:4", "accumulation": 4}
    plain = recipe_of("flux", tmp_path, **data)
    half = recipe_of("flux", tmp_path, **data, caption_dropout=0.5)
    always = recipe_of("flux", tmp_path, **data, caption_dropout=1.0)

    def embeds(made: Any, step: int) -> dict[str, torch.Tensor]:
        return {one.items[0]: one.data["text"]["embeds"] for one in made.micro_batches(step, 0, 1)}

    empty = next(iter(embeds(always, 0).values()))
    assert all(torch.equal(one, empty) for one in embeds(always, 3).values())
    dropped = 0
    for step in range(8):
        kept = embeds(plain, step)
        for item, one in embeds(half, step).items():
            assert torch.equal(one, empty) != torch.equal(one, kept[item])
            dropped += torch.equal(one, empty)
    assert 8 <= dropped <= 24


def test_sdxl_drops_captions_as_its_folder_says(tmp_path: Path) -> None:
    made = recipe_of("sdxl", tmp_path, caption_dropout=1.0)
    text = made.micro_batches(0, 0, 1)[0].data["text"]
    assert not text["embeds"].any()
    assert not text["pooled"].any()


def test_a_given_first_frame_leaves_nothing_to_learn_of_a_picture(tmp_path: Path) -> None:
    """Where it takes the place of a latent frame, the loss would be 0 / 0."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (96, 64), "red").save(tmp_path / "data" / "still.png")
    write_video([Image.new("RGB", (96, 64), (20 * n, 0, 0)) for n in range(6)], tmp_path / "data" / "clip.mp4", 8.0, {})
    given = {"data": str(tmp_path / "data"), "accumulation": 2}
    made = recipe_of(FIRST_FRAME, tmp_path / "run", **given)
    assert "left out, as the model takes no clip of so few frames: still.png (1)" in made.notes
    for batch in made.micro_batches(0, 0, 1):
        assert batch.items == ("clip.mp4",)
        assert batch.data["condition"]["free"].sum() > 0
        assert made.loss(made.models["transformer"], batch.data).isfinite()
    with pytest.raises(InputError, match=r"no sample is long enough for this model: still-0000000 \(1\)"):
        recipe_of(FIRST_FRAME, tmp_path / "still", data="shapes:still:1")
    with pytest.raises(InputError, match="such as 5, got 1"):
        recipe_of(FIRST_FRAME, tmp_path / "one", num_frames=1)
    assert recipe_of("wan2.2-i2v", tmp_path / "channels", **given).steps_per_epoch == 1  # the picture is in
