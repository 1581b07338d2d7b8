"""`Media`: what an item shows, an image or a clip, wherever it comes from."""

from __future__ import annotations

import functools
import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from shardit.diffusion.request.images import reason
from shardit.errors import InputError

_SAMPLED_FROM = 4 * 2**20
"""Bytes above which only parts of a clip enter its digest."""

_PARTS, _PART = 16, 64 * 2**10
"""Number of these parts, and bytes of each."""

_CHUNK = 2**20

_BREAKING = ("Cc", "Zl", "Zp")
"""Categories of characters that break or disturb a line of text."""


@dataclass(frozen=True)
class Reading:
    """Settings for reading media."""

    frames: int = 1
    """The most frames of a clip that are asked for."""
    fps: float | None = None
    """Frames per second at which clips are read; None: their own."""
    background: str = "white"
    """Colour behind transparent pixels."""

    def __post_init__(self) -> None:
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise InputError(f"background must be an opaque colour such as white or #80ff00, got {self.background!r}")


@dataclass(frozen=True)
class Extent:
    """Size of a medium, upright and with square pixels."""

    width: int
    """0 for what is drawn at any size."""
    height: int
    frames: int
    """Frames at the rate of the reading, no more than it asks for."""
    notes: tuple[str, ...] = ()
    """Oddities for the user, without the name."""


class Media(Protocol):
    """An image or a clip."""

    @property
    def moving(self) -> bool:
        """Whether it is a clip."""
        ...

    def extent(self, reading: Reading) -> Extent:
        """Look how large it is, without reading it all. Raises InputError, which names it."""
        ...

    def read(self, reading: Reading, width: int, height: int, frames: int) -> NDArray[np.uint8]:
        """Return (frames, height, width, 3). Raises InputError, which names it."""
        ...

    def digest(self) -> str:
        """Return a digest of its content."""
        ...


def fit(image: Image.Image, width: int, height: int, pixel_aspect: float = 1.0) -> Image.Image:
    """Cut the middle with the proportions of the size asked for out of an RGB image, and resize that.

    pixel_aspect: width of the image's pixels over their height.
    """
    wide, high = image.size
    wanted = width / height / pixel_aspect
    cut_wide, cut_high = min(wide, high * wanted), min(high, wide / wanted)
    left, top = (wide - cut_wide) / 2, (high - cut_high) / 2
    box = (left, top, left + cut_wide, top + cut_high)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def array(images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    """Return RGB images of one size as one array."""
    return np.stack([np.asarray(image) for image in images])


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path as one line of text: line breaks and the like, and bytes that are no text, are written out."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(repr(one)[1:-1] if unicodedata.category(one) in _BREAKING else one for one in text)


def unreadable(kind: str, path: Path, error: Exception) -> InputError:
    """Return the error of a file that cannot be read. kind: the word for it."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
    return InputError(f"{kind} {shown(path)} cannot be read: {said.rstrip('.')}; replace it or take it out")


def file_digest(path: Path, *, sampled: bool = False) -> str:
    """Return a digest of a file's content; sampled: of its size and of parts of it, if it is large. Raises InputError.

    Samples are enough for clips: they are compressed, so that another clip differs nearly everywhere.
    """
    try:
        state = os.stat(path)
        return _digest(str(path), state.st_size, state.st_mtime_ns, sampled and state.st_size > _SAMPLED_FROM)
    except OSError as error:
        raise unreadable("file", path, error) from None


@functools.lru_cache(maxsize=2**20)
def _digest(path: str, size: int, modified: int, sampled: bool) -> str:
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if sampled:
            found.update(str(size).encode())
        for number in range(_PARTS if sampled else -(-size // _CHUNK)):
            file.seek((size - _PART) * number // (_PARTS - 1) if sampled else number * _CHUNK)
            found.update(file.read(_PART if sampled else _CHUNK))
    return found.hexdigest()
