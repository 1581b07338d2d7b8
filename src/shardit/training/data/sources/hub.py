"""Data sets of the package `datasets`: a column of images and one of captions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shardit.diffusion.request.images import Mode
from shardit.errors import InputError, first_line
from shardit.loading.missing_packages import check_installed
from shardit.training.data.images import extent_of, plain
from shardit.training.data.items import FoundItems, Item, found
from shardit.training.data.media import Extent, Reading, array, fit
from shardit.training.data.sources.captions import caption
from shardit.training.data.sources.rows import TEXTS

IMAGES = "image"
"""The column of images."""


@dataclass(frozen=True, eq=False)
class RowImage:
    """The image of a row."""

    table: Any
    number: int
    moving = False

    def extent(self, reading: Reading) -> Extent:
        """As `Media.extent`."""
        return extent_of(self._image())

    def read(self, reading: Reading, width: int, height: int, frames: int) -> NDArray[np.uint8]:
        """As `Media.read`."""
        return array([fit(self._plain(reading.background), width, height)] * frames)

    def digest(self) -> str:
        """As `Media.digest`. Palette, orientation and transparency count, so it is that of the upright colours."""
        image = self._plain(mode="RGBA")
        return hashlib.blake2b(f"{image.size} ".encode() + image.tobytes(), digest_size=16).hexdigest()

    def _plain(self, background: str = "white", mode: Mode = "RGB") -> Image.Image:
        image = self._image()
        with self._named():
            return plain(image, background, mode)

    def _image(self) -> Image.Image:
        with self._named():
            image = self.table[self.number][IMAGES]
        if not isinstance(image, Image.Image):
            given = "no image" if image is None else f"a {type(image).__name__}, not an image,"
            raise InputError(f"row {self.number} of the data has {given} in the column {IMAGES}; take it out")
        return image

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the row in errors."""
        try:
            yield
        except Exception as error:  # decoders raise nearly anything on damaged data
            raise InputError(f"row {self.number} of the data cannot be read: {first_line(error)}") from error


def hub_items(name: str) -> FoundItems:
    """Return the items of "NAME" or "NAME:SPLIT" (the split "train"). Raises InputError."""
    check_installed(["datasets"])
    import datasets  # pyright: ignore[reportMissingImports]

    repository, _, split = name.partition(":")
    try:
        table = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # of the network, the hub, the data's format
        raise InputError(f"data hf:{name} cannot be loaded: {first_line(error)}") from error
    texts = [column for column in TEXTS if column in table.column_names]
    if IMAGES not in table.column_names or len(texts) != 1:
        there = ", ".join(table.column_names)
        raise InputError(f"data hf:{name} needs a column {IMAGES} and one of {' or '.join(TEXTS)}, has {there}")
    if not len(table[texts[0]]):
        raise InputError(f"data hf:{name} has no rows")
    captions = [caption(text or "") for text in table[texts[0]]]
    return found(Item(f"{number:09}", RowImage(table, number), text) for number, text in enumerate(captions))
