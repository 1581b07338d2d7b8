"""Buckets: the few sizes and lengths that samples are brought to, so that some of one size make a batch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from shardit.errors import InputError
from shardit.training.data.media import Extent

RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 21 / 9, 3)
"""Longer side over the shorter one."""

_LONGEST = 2**15
"""The longest side and the most frames that anybody can mean."""


@dataclass(frozen=True, order=True)
class Bucket:
    """One size and length of samples."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        length = f", {self.frames} frames" if self.frames > 1 else ""
        return f"{self.width}x{self.height}{length}"


@dataclass(frozen=True)
class Format:
    """The sizes and lengths that a model takes."""

    width: int
    """The model's own size."""
    height: int
    multiple: int = 16
    """Sizes are multiples of this."""
    frames: int | None = None
    """The model's own number of frames; None for a model of images."""
    takes_frames: Callable[[int], bool] = lambda frames: True
    """Whether a clip may have so many frames, as in `lambda frames: frames % 4 == 1`."""


def frames_asked(wanted: int | None, fps: float | None, format: Format) -> int:
    """Return the most frames of a sample, given the settings num_frames and fps. Raises InputError."""
    if format.frames is None:
        for name, value in (("num_frames", wanted), ("fps", fps)):
            if value not in (None, 1):
                raise InputError(f"{name} is for models of videos, and this one makes images; leave it out")
        return 1
    frames = wanted or format.frames
    if not format.takes_frames(frames):
        below, above = longest(frames, format), _next(frames, format)
        near = " or ".join(str(one) for one in (below, above) if one)
        raise InputError(f"num_frames must be a number that the model takes, such as {near}, got {frames}")
    return frames


def longest(frames: int, format: Format) -> int:
    """Return the largest number of frames up to `frames` that a model takes; 0 if there is none."""
    return next((one for one in range(frames, 0, -1) if format.takes_frames(one)), 0)


def _next(frames: int, format: Format) -> int:
    return next((one for one in range(frames, min(frames * 2 + 64, _LONGEST)) if format.takes_frames(one)), 0)


def sizes_asked(resolution: str, format: Format) -> list[tuple[int, int]]:
    """Return the sizes that samples may have, given the setting resolution: one size, or several with about one area.
    The first one is that of samples that have no size of their own. Raises InputError."""
    found = re.fullmatch(r"\s*(\d{1,5})\s*(?:[xX×*]\s*(\d{1,5})\s*)?", resolution, re.ASCII)
    if resolution and not found:
        raise InputError(f"resolution must be WIDTHxHEIGHT or one number, as in 832x480 or 512, got {resolution!r}")
    if found and found[2]:
        width, height = int(found[1]), int(found[2])
        wrong = not _is_size(width, format) or not _is_size(height, format)
        if wrong:
            near = f"{_nearest(width, format)}x{_nearest(height, format)}"
            raise InputError(
                f"resolution must have multiples of {format.multiple} as its sides, such as {near}, got {resolution}"
            )
        return [(width, height)]
    if found:
        side = int(found[1])
        if not format.multiple <= side <= _LONGEST:
            raise InputError(f"resolution must be from {format.multiple} to {_LONGEST}, got {resolution}")
        own, area = [], side * side
    else:
        own, area = [(format.width, format.height)], format.width * format.height
    ratios = [ratio for one in RATIOS for ratio in dict.fromkeys((one, 1 / one))]
    return list(dict.fromkeys([*own, *(_size(area, ratio, format.multiple) for ratio in ratios)]))


def bucket_of(extent: Extent, sizes: list[tuple[int, int]], format: Format) -> Bucket | None:
    """Return the bucket of a sample: the size of the nearest proportions and the longest length that it fills. None
    if it is shorter than any clip that the model takes."""
    frames = longest(extent.frames, format) if format.frames is not None else 1
    if not frames:
        return None
    if not extent.width:
        return Bucket(*sizes[0], frames)
    ratio = math.log(extent.width / extent.height)
    width, height = min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))
    return Bucket(width, height, frames)


def _size(area: float, ratio: float, multiple: int) -> tuple[int, int]:
    """Return the multiples that are nearest to an area and a ratio of width to height."""
    wide, high = math.sqrt(area * ratio) / multiple, math.sqrt(area / ratio) / multiple
    near = [{max(1, math.floor(side)), max(1, math.ceil(side))} for side in (wide, high)]
    choices = [(x * multiple, y * multiple) for x, y in itertools.product(*near)]
    return min(
        choices,
        key=lambda size: (
            round(abs(math.log(size[0] * size[1] / area)) + abs(math.log(size[0] / size[1] / ratio)), 9),
            size,
        ),
    )


def _is_size(side: int, format: Format) -> bool:
    return 0 < side <= _LONGEST and side % format.multiple == 0


def _nearest(side: int, format: Format) -> int:
    limited = min(side, _LONGEST)
    return max(1, round(limited / format.multiple)) * format.multiple
