"""Sizes of buckets, lengths of clips, and the settings that ask for them."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from shardit.errors import InputError
from shardit.training.data.buckets import Bucket, Format, bucket_of, frames_asked, longest, sizes_asked
from shardit.training.data.media import Extent

WAN = Format(832, 480, multiple=16, frames=81, takes_frames=lambda frames: frames % 4 == 1)
FLUX = Format(1024, 1024, multiple=16)


@pytest.mark.parametrize("multiple", [1, 2, 8, 16, 32, 64])
@pytest.mark.parametrize("side", [64, 256, 480, 512, 768, 1024, 1000])
def test_sizes_have_about_the_area(side: int, multiple: int) -> None:
    sizes = sizes_asked(str(side), Format(512, 512, multiple=multiple))
    assert all(one % multiple == 0 for size in sizes for one in size)
    assert len(set(sizes)) == len(sizes)
    assert {(high, wide) for wide, high in sizes} == set(sizes)  # upright ones as well as wide ones
    if side >= 8 * multiple:
        assert all(0.8 < wide * high / side**2 < 1.25 for wide, high in sizes)
        ratios = sorted(wide / high for wide, high in sizes)
        assert ratios[0] < 0.4 < 2.5 < ratios[-1]
        assert all(after / before < 1.6 for before, after in itertools.pairwise(ratios))
    near = side / multiple
    assert abs(math.log(sizes[0][0] * sizes[0][1] / side**2)) < 3 / near
    assert sizes[0][0] == sizes[0][1]


def test_sizes_of_known_areas() -> None:
    assert (1024, 1024) in sizes_asked("1024", FLUX)
    assert (1360, 768) in sizes_asked("1024", FLUX) or (1376, 768) in sizes_asked("1024", FLUX)
    assert sizes_asked("", WAN)[0] == (832, 480)
    assert (480, 832) in sizes_asked("", WAN)
    assert sizes_asked("832x480", WAN) == sizes_asked(" 832 X 480 ", WAN) == [(832, 480)]
    assert sizes_asked("16", WAN)[0] == (16, 16)


@pytest.mark.parametrize(
    ("resolution", "message"),
    {
        "800x500": "resolution must have multiples of 16 as its sides, such as 800x496, got 800x500",
        "0x16": "resolution must have multiples of 16 as its sides, such as 16x16, got 0x16",
        "99999x16": "resolution must have multiples of 16 as its sides, such as 32768x16, got 99999x16",
        "15": "resolution must be from 16 to 32768, got 15",
        "0": "resolution must be from 16 to 32768, got 0",
        "99999": "resolution must be from 16 to 32768, got 99999",
        "big": "resolution must be WIDTHxHEIGHT or one number, as in 832x480 or 512, got 'big'",
        "-512": "resolution must be WIDTHxHEIGHT or one number, as in 832x480 or 512, got '-512'",
        "512x": "resolution must be WIDTHxHEIGHT or one number, as in 832x480 or 512, got '512x'",
        "١٢x16": "resolution must be WIDTHxHEIGHT or one number, as in 832x480 or 512, got '١٢x16'",
        "5.5": "resolution must be WIDTHxHEIGHT or one number, as in 832x480 or 512, got '5.5'",
    }.items(),
)
def test_wrong_sizes(resolution: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        sizes_asked(resolution, WAN)
    assert str(raised.value) == message


def test_frames_asked() -> None:
    assert frames_asked(None, None, WAN) == 81
    assert frames_asked(5, 16, WAN) == 5
    assert frames_asked(None, None, FLUX) == frames_asked(1, None, FLUX) == 1


@pytest.mark.parametrize(
    ("frames", "fps", "format", "message"),
    [
        (80, None, WAN, "num_frames must be a number that the model takes, such as 77 or 81, got 80"),
        (3, None, Format(8, 8, frames=9, takes_frames=lambda n: n % 8 == 1 and n > 1), "such as 9, got 3"),
        (16, None, FLUX, "num_frames is for models of videos, and this one makes images; leave it out"),
        (None, 8.0, FLUX, "fps is for models of videos, and this one makes images; leave it out"),
    ],
)
def test_wrong_frames(frames: int | None, fps: float | None, format: Format, message: str) -> None:
    with pytest.raises(InputError) as raised:
        frames_asked(frames, fps, format)
    assert str(raised.value).endswith(message)


def test_longest() -> None:
    assert [longest(frames, WAN) for frames in (81, 80, 5, 4, 1, 0)] == [81, 77, 5, 1, 1, 0]


def test_a_sample_takes_the_nearest_proportions() -> None:
    draw = random.Random(0)
    sizes = sizes_asked("512", FLUX)
    for _ in range(200):
        wide, high = draw.randint(1, 4000), draw.randint(1, 4000)
        bucket = bucket_of(Extent(wide, high, 1), sizes, FLUX)
        assert bucket is not None
        off = abs(math.log(bucket.width / bucket.height / (wide / high)))
        assert all(off <= abs(math.log(one[0] / one[1] / (wide / high))) + 1e-9 for one in sizes)
        turned = bucket_of(Extent(high, wide, 1), sizes, FLUX)
        assert turned == Bucket(bucket.height, bucket.width)


def test_what_has_no_size_takes_the_first() -> None:
    assert bucket_of(Extent(0, 0, 81), sizes_asked("", WAN), WAN) == Bucket(832, 480, 81)
    assert bucket_of(Extent(0, 0, 81), sizes_asked("512", WAN), WAN) == Bucket(512, 512, 81)
    assert bucket_of(Extent(8, 8, 0), [(16, 16)], WAN) is None
