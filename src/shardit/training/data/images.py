"""Images in files: upright, on a background, 8 bits; cut and resized to the size asked for."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shardit.diffusion.request.images import Mode, to_eight_bits, to_mode
from shardit.errors import InputError
from shardit.training.data.media import Extent, Reading, array, file_digest, fit, unreadable

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of image files, in small letters."""

_ORIENTATION = 0x0112
"""The EXIF tag for the orientation of the camera."""

_TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Operation that makes an image upright, by the value of that tag."""

_SCALES: dict[Any, Callable[[int], int]] = {
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: value >> 8,
}
"""From a value at the depth of a PNG file to 8 bits, by PIL's name of the file's pixels."""

_ANIMATED = ("PNG", "WEBP", "GIF")
"""Formats whose further frames are an animation; those of a JPEG are other views of the same scene."""

_SIDEWAYS = (5, 6, 7, 8)
"""The values that exchange width and height."""


@dataclass(frozen=True)
class ImageFile:
    """An image in a file."""

    path: Path
    moving = False

    def extent(self, reading: Reading) -> Extent:
        """As `Media.extent`."""
        with _opened(self.path) as image:
            return extent_of(image)

    def read(self, reading: Reading, width: int, height: int, frames: int) -> NDArray[np.uint8]:
        """As `Media.read`."""
        with _opened(self.path) as image:
            return array([fit(plain(image, reading.background), width, height)] * frames)

    def digest(self) -> str:
        """As `Media.digest`."""
        return file_digest(self.path)


def extent_of(image: Image.Image) -> Extent:
    """Return how large an opened image is."""
    turn, notes = orientation(image)
    width, height = image.size[::-1] if turn in _SIDEWAYS else image.size
    if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
        notes = (*notes, "is animated: its first frame is used")
    return Extent(width, height, 1, notes)


def plain(image: Image.Image, background: str, mode: Mode = "RGB") -> Image.Image:
    """Return an image upright, with 8 bits: RGB on the background, or RGBA."""
    turn, _ = orientation(image)
    method, narrow = _TURNS[turn], _eight_bits(image)
    return to_mode(narrow if method is None else narrow.transpose(method), mode, background)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits, also if a grey of 16 bits is declared as transparent."""
    key = image.info.get("transparency")
    narrow = to_eight_bits(image)
    if isinstance(key, int) and image.mode.startswith("I"):
        shown = np.asarray(image) != key
        narrow.putalpha(Image.fromarray(shown.astype(np.uint8) * 255))
    return narrow


def _scale_transparency(image: Image.Image) -> None:
    """Bring the colour that an opened file declares as transparent to 8 bits: PIL does so with its pixels alone, and
    then none has that colour."""
    key = image.info.get("transparency")
    if key is None or image.format != "PNG":
        return
    scale = next((_SCALES[tile[3]] for tile in getattr(image, "tile", ()) if tile[3] in _SCALES), None)
    if scale is not None:
        image.info["transparency"] = tuple(map(scale, key)) if isinstance(key, tuple) else scale(key)


def orientation(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    """Return the EXIF orientation of an image, from 1 to 8, and notes on EXIF data without one."""
    with warnings.catch_warnings():  # PIL warns of parts that it cannot read
        warnings.simplefilter("ignore")
        try:
            tags = dict(image.getexif())
        except Exception:  # nearly anything, on damaged data
            tags = {}
    found = tags.get(_ORIENTATION, 1)
    if not tags and _lists_tags(image.info.get("exif") or b""):
        return 1, ("has EXIF data that cannot be read: it is taken as upright",)
    if found not in _TURNS:
        return 1, (f"has the EXIF orientation {found!r:.20}, which is none of 1 to 8: it is taken as upright",)
    return found, ()


def _lists_tags(exif: bytes) -> bool:
    """Return whether EXIF data are more than an empty list of tags, which programs write without any."""
    content = exif.removeprefix(b"Exif\0\0")
    order = "<" if content.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", content, 4)
        (length,) = struct.unpack_from(f"{order}H", content, start)
    except struct.error:
        return bool(content)
    return length > 0


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        if path.stat().st_size == 0:
            raise InputError("the file is empty")
        with warnings.catch_warnings():  # of large sizes and broken EXIF data; what PIL refuses is an error
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                _scale_transparency(image)
                yield image
    # PIL's decoders raise nearly anything on damaged data: SyntaxError, struct.error, EOFError, ValueError, ...
    except Exception as error:
        raise unreadable("image", path, error) from error
