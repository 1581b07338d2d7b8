"""tiny/shapes: its videos show what the prompts ask for, also for prompts that it was not trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shardit.models import tiny
from shardit.training.data import shapes

PROMPTS = (
    ("blue", "square", "right", "white"),
    ("yellow", "square", "up", "black"),
    ("white", "circle", "down", "black"),
    ("green", "triangle", "left", "yellow"),
)


@pytest.fixture(scope="module")
def videos() -> list[NDArray[np.uint8]]:
    """Videos for the prompts, as (frames, height, width, 3)."""
    pipe = tiny.load_plain(tiny.resolve("tiny/shapes"))  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    captions = [shapes.Drawing(outline, colour, ground, way).caption for colour, outline, way, ground in PROMPTS]
    assert not set(captions) & set(shapes.captions()), "they are held out"
    generators = [torch.Generator().manual_seed(number) for number, _ in enumerate(captions)]
    made: Any = pipe(prompt=captions, generator=generators, output_type="np", **tiny.filled_in("shapes", ()))
    return list(np.rint(made.frames * 255).astype(np.uint8))


def test_the_example_is_a_caption() -> None:
    assert tiny.example_prompt("shapes") in shapes.captions(held_out=True)


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_colours_and_motion(number: int, videos: list[NDArray[np.uint8]]) -> None:
    colour, _, way, ground = PROMPTS[number]
    names = list(shapes.COLOURS)
    table = np.array([shapes.COLOURS[name] for name in names], np.float32)
    nearest = np.linalg.norm(videos[number][..., None, :].astype(np.float32) - table, axis=-1).argmin(-1)
    share = {name: float((nearest == place).mean()) for place, name in enumerate(names)}
    assert share[ground] > 0.6, share
    assert share[colour] > 0.04, share
    assert share[ground] + share[colour] > 0.9, share
    centres = np.array([np.argwhere(frame == names.index(colour)).mean(0)[::-1] for frame in nearest])
    moved = centres[-1] - centres[0]
    signs = np.array(shapes.DIRECTIONS[way])
    assert moved @ signs > 10, centres  # of 64 pixels
    assert abs(moved @ (1 - abs(signs))) < 6, centres
