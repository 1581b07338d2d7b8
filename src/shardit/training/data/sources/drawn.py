"""Drawn shapes as data: shapes:moving and its like."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardit.training.data.items import FoundItems, Item, found
from shardit.training.data.media import Extent, Reading
from shardit.training.data.shapes import Drawing, drawing, kind_and_count

COUNT, HELD_OUT_COUNT = 2000, 64
"""Items of shapes:KIND, as data and as held-out data; shapes:KIND:COUNT has another number."""


@dataclass(frozen=True)
class Drawn:
    """A drawn clip, at any size."""

    drawing: Drawing

    @property
    def moving(self) -> bool:
        """As `Media.moving`."""
        return bool(self.drawing.direction)

    def extent(self, reading: Reading) -> Extent:
        """As `Media.extent`."""
        return Extent(0, 0, reading.frames if self.moving else 1)

    def read(self, reading: Reading, width: int, height: int, frames: int) -> NDArray[np.uint8]:
        """As `Media.read`."""
        return self.drawing.frames(width, height, frames)

    def digest(self) -> str:
        """As `Media.digest`."""
        return hashlib.blake2b(repr(dataclasses.astuple(self.drawing)).encode(), digest_size=16).hexdigest()


def drawn_items(name: str, held_out: bool) -> FoundItems:
    """Return the items of "KIND" or "KIND:COUNT"; held_out: with captions that the others never have. Raises
    InputError."""
    kind, count = kind_and_count(name)
    total = count or (HELD_OUT_COUNT if held_out else COUNT)
    drawn = [drawing(index, kind=kind, held_out=held_out) for index in range(total)]
    return found(Item(f"{kind}-{index:07}", Drawn(one), one.caption) for index, one in enumerate(drawn))
