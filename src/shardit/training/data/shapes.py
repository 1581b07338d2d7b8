"""Drawn clips: a coloured shape on a coloured ground that moves in a direction, with a caption in plain words."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardit.errors import InputError

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 225),
    "yellow": (245, 215, 50),
    "purple": (150, 55, 190),
    "white": (242, 242, 242),
    "black": (20, 20, 20),
}
"""Colours of shapes and grounds, far enough apart to be distinguishable after a lossy decoder."""

OUTLINES = ("circle", "square", "triangle")

DIRECTIONS = {
    "right": (1, 0),
    "left": (-1, 0),
    "down": (0, 1),
    "up": (0, -1),
    "up right": (1, -1),
    "up left": (-1, -1),
    "down right": (1, 1),
    "down left": (-1, 1),
}
"""Signs of the motion along x and y; y points down."""

KINDS: dict[str, tuple[str, ...]] = {
    "still": ("",),
    "moving": ("right", "left", "down", "up"),
    "centred": ("right", "left", "down", "up"),
    "diagonal": tuple(DIRECTIONS),
}
"""Directions in each kind of data, by the name behind "shapes:". Centred shapes move through the middle of the frame
and hardly differ in size: a small model learns them in an hour."""

_MOST = 10**7
"""Largest number of drawn items."""

_HELD_OUT = 8
"""One of so many captions is held out."""

_SIZES = (0.17, 0.26)
"""Half the size of a shape, as a share of the shorter side."""

_TRAVEL = (0.3, 0.44)
"""Distance from the first frame to the last, as a share of each side."""

_CENTRED_SIZES, _CENTRED_TRAVEL, _CENTRED_ROOM = (0.2, 0.24), (0.38, 0.44), 0.03
"""The same for centred shapes, and the largest distance of the middle of a path from that of the frame."""

_MARGIN = 0.02
"""Share of a side between a shape and the edge of the frame."""


def kind_and_count(name: str) -> tuple[str, int | None]:
    """Return the parts of "KIND" or "KIND:COUNT". Raises InputError."""
    kind, colon, number = name.partition(":")
    if kind not in KINDS:
        raise InputError(f"data shapes:{name} must be one of {', '.join(f'shapes:{one}' for one in KINDS)}")
    if colon and not (number.isascii() and number.isdecimal() and 1 <= int(number) <= _MOST):
        raise InputError(f"data shapes:{name}: the number of items must be from 1 to {_MOST}, as in shapes:{kind}:500")
    return kind, int(number) if colon else None


@dataclass(frozen=True)
class Drawing:
    """The attributes of a drawn clip. Lengths are shares of the frame, so that they go with any size."""

    outline: str
    colour: str
    ground: str
    direction: str
    """A key of DIRECTIONS; "" for a still one."""
    half: float = 0.2
    """Half the size of the shape, as a share of the shorter side."""
    centre: tuple[float, float] = (0.5, 0.5)
    """Place of the centre in the middle of the clip, as shares of width and height."""
    travel: float = 0.4
    """Distance from the first frame to the last, as a share of each side along which it moves."""

    @property
    def caption(self) -> str:
        """The caption in plain words."""
        return _caption(self.outline, self.colour, self.ground, self.direction)

    def frames(self, width: int, height: int, frames: int) -> NDArray[np.uint8]:
        """Draw the clip, as (frames, height, width, 3)."""
        ground, colour = (np.array(COLOURS[name], np.float32) for name in (self.ground, self.colour))
        made = np.empty((frames, height, width, 3), np.uint8)
        for number in range(frames):
            share = number / (frames - 1) - 0.5 if frames > 1 else 0.0
            inside = self._inside(width, height, share)[..., None]
            made[number] = np.rint(ground + inside * (colour - ground))
        return made

    def _inside(self, width: int, height: int, share: float) -> NDArray[np.float32]:
        """Return the share of each pixel that the shape covers. share: time of the frame, from -0.5 to 0.5."""
        x, y = DIRECTIONS.get(self.direction, (0, 0))
        left = np.arange(width, dtype=np.float32) + 0.5 - (self.centre[0] + x * self.travel * share) * width
        top = np.arange(height, dtype=np.float32) + 0.5 - (self.centre[1] + y * self.travel * share) * height
        distance = _distance(self.outline, left[None, :], top[:, None], self.half * min(width, height))
        return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def drawing(index: int, *, seed: int = 0, kind: str = "moving", held_out: bool = False) -> Drawing:
    """Return the attributes of one clip. They follow from the arguments alone.

    kind: a key of KINDS. held_out: a clip with one of the captions that others never have.
    """
    # random.Random with a text gives the same numbers in each version of Python, on each machine.
    draw = random.Random(f"{seed}/{index}/{kind}/{held_out}")
    choices = _choices(kind, held_out)
    outline, colour, ground, direction = choices[int(draw.random() * len(choices))]
    centred = kind == "centred"
    half = _between(draw, *(_CENTRED_SIZES if centred else _SIZES))
    travel = _between(draw, *(_CENTRED_TRAVEL if centred else _TRAVEL)) if direction else 0.0
    signs = DIRECTIONS.get(direction, (0, 0))
    # Shares of a side: the shape with its whole path stays in the frame, which holds for any aspect ratio, as `half`
    # is a share of the shorter side.
    free = [_CENTRED_ROOM if centred else 0.5 - _MARGIN - half - abs(sign) * travel / 2 for sign in signs]
    x, y = (0.5 + _between(draw, -room, room) for room in free)
    return Drawing(outline, colour, ground, direction, half, (x, y), travel)


def clip(
    index: int, *, width: int, height: int, frames: int, seed: int = 0, kind: str = "moving", held_out: bool = False
) -> tuple[NDArray[np.uint8], str]:
    """Return the frames of one clip, as (frames, height, width, 3), and its caption; `drawing` has its attributes."""
    chosen = drawing(index, seed=seed, kind=kind, held_out=held_out)
    return chosen.frames(width, height, frames), chosen.caption


def captions(kind: str = "moving", *, held_out: bool = False) -> list[str]:
    """Return all captions of a kind that are trained on, or all that are held out."""
    return [_caption(*choice) for choice in _choices(kind, held_out)]


@functools.cache
def _choices(kind: str, held_out: bool) -> list[tuple[str, str, str, str]]:
    every = itertools.product(OUTLINES, COLOURS, COLOURS, KINDS[kind])
    different = (choice for choice in every if choice[1] != choice[2])
    return [choice for choice in different if _is_held_out(_caption(*choice)) == held_out]


def _is_held_out(caption: str) -> bool:
    return hashlib.sha256(caption.encode()).digest()[0] % _HELD_OUT == 0


def _caption(outline: str, colour: str, ground: str, direction: str) -> str:
    first, _, second = direction.partition(" ")
    side = f"to the {second or first}" if (second or first) in ("right", "left") else first
    motion = f"{first} and {side}" if second else side
    return f"a {colour} {outline} {f'moves {motion} ' if direction else ''}on a {ground} ground"


def _between(draw: random.Random, low: float, high: float) -> float:
    return low + (high - low) * draw.random()


def _distance(outline: str, x: NDArray[np.float32], y: NDArray[np.float32], half: float) -> NDArray[Any]:
    """Return the distance of pixels from the outline of a shape around (0, 0), below 0 inside of it."""
    if outline == "circle":
        return np.hypot(x, y) - half
    if outline == "square":
        side = 0.9 * half  # about as large as the circle for the eye
        return np.maximum(np.abs(x), np.abs(y)) - side
    # A triangle that points up and fills the square around it.
    slanted = (2 * np.abs(x) - y - half) / 5**0.5
    return np.maximum(slanted, y - half)
