"""Drawn clips show what their captions say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from shardit.training.data.shapes import COLOURS, DIRECTIONS, KINDS, OUTLINES, Drawing, captions, clip, drawing


def covered(frame: np.ndarray, shown: Drawing) -> np.ndarray:
    """The share of each pixel that has the shape's colour rather than the ground's."""
    ground, colour = (np.array(COLOURS[name], float) for name in (shown.ground, shown.colour))
    along = colour - ground
    return (frame.astype(float) - ground) @ along / (along @ along)


def centre(share: np.ndarray) -> tuple[float, float]:
    rows, columns = np.indices(share.shape)
    return float((share * columns).sum() / share.sum()), float((share * rows).sum() / share.sum())


@pytest.mark.parametrize("size", [(48, 48), (64, 32), (40, 80)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shape_moves_as_the_caption_says(size: tuple[int, int], direction: str) -> None:
    shown = Drawing("circle", "red", "blue", direction)
    frames = shown.frames(*size, 5)
    assert frames.shape == (5, size[1], size[0], 3)
    assert frames.dtype == np.uint8
    (x0, y0), (x1, y1) = centre(covered(frames[0], shown)), centre(covered(frames[-1], shown))
    moved = (x1 - x0) / size[0], (y1 - y0) / size[1]
    assert np.allclose(moved, 0.4 * np.array(DIRECTIONS[direction]), atol=0.02)
    steps = [centre(covered(frame, shown))[0] for frame in frames]
    assert np.allclose(np.diff(steps), np.diff(steps).mean(), atol=0.1)  # at one speed


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_stay_in_the_frame(kind: str) -> None:
    for index, (width, height) in itertools.product(range(60), [(64, 64), (96, 48)]):
        shown = drawing(index, seed=3, kind=kind)
        for frame in shown.frames(width, height, 5)[[0, -1]]:
            edges = [frame[0], frame[-1], frame[:, 0], frame[:, -1]]
            # The outermost pixels may be touched by the smoothed outline only.
            assert all(np.abs(edge - np.array(COLOURS[shown.ground], float)).max() < 120 for edge in edges)


def test_outlines_have_their_areas_and_smooth_edges() -> None:
    half = 0.25 * 200
    areas = {"circle": np.pi * half**2, "square": (1.8 * half) ** 2, "triangle": 2 * half**2}
    for outline in OUTLINES:
        shown = Drawing(outline, "white", "black", "", half=0.25)
        share = covered(shown.frames(200, 200, 1)[0], shown)
        assert share.sum() == pytest.approx(areas[outline], rel=0.01)
        assert outline == "square" or ((share > 0.2) & (share < 0.8)).sum() > 50
    triangle = Drawing("triangle", "white", "black", "", half=0.25)
    rows = covered(triangle.frames(200, 200, 1)[0], triangle).sum(1)
    assert rows[60] < rows[140]  # it points up


def test_captions_are_plain_words_and_name_what_is_drawn() -> None:
    assert Drawing("circle", "red", "blue", "right").caption == "a red circle moves to the right on a blue ground"
    assert Drawing("square", "red", "blue", "up").caption == "a red square moves up on a blue ground"
    assert Drawing("square", "red", "blue", "down left").caption == (
        "a red square moves down and to the left on a blue ground"
    )
    assert Drawing("triangle", "white", "black", "").caption == "a white triangle on a black ground"
    frames, caption = clip(7, width=16, height=8, frames=3)
    assert caption == drawing(7).caption
    assert np.array_equal(frames, drawing(7).frames(16, 8, 3))


def test_a_clip_follows_from_its_arguments() -> None:
    assert drawing(5, seed=1) == drawing(5, seed=1)
    assert len({drawing(index, seed=seed) for index in range(50) for seed in range(2)}) == 100
    # Recorded, so that a checkpoint that was trained on them can be judged on the same ones later.
    assert [drawing(index).caption for index in range(3)] == RECORDED


RECORDED = [
    "a red triangle moves to the right on a yellow ground",
    "a purple circle moves up on a white ground",
    "a yellow triangle moves down on a purple ground",
]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_captions_are_new_as_a_whole_only(kind: str) -> None:
    trained, held = captions(kind), captions(kind, held_out=True)
    assert not set(trained) & set(held)
    total = len(OUTLINES) * len(COLOURS) * (len(COLOURS) - 1) * len(KINDS[kind])
    assert len(trained) + len(held) == total
    assert 0.06 < len(held) / total < 0.19
    assert {word for one in held for word in one.split()} <= {word for one in trained for word in one.split()}
    assert {drawing(index, kind=kind).caption for index in range(300)} <= set(trained)
    assert {drawing(index, kind=kind, held_out=True).caption for index in range(300)} <= set(held)


def test_colours_are_far_apart() -> None:
    assert len(COLOURS) >= 6
    for one, other in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(one, other)) > 100, (one, other)
