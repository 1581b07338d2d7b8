"""Pictures are trained upright, on a background, in 8 bits, in the bucket of their upright size."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shardit.errors import InputError
from shardit.training.data.buckets import Format
from shardit.training.data.dataset import Dataset, open_dataset
from shardit.training.data.images import ImageFile
from shardit.training.data.media import Reading, fit
from shardit.training.settings import TrainSettings
from tests.training.data.files import PICTURES, picture

CORNERS = np.array(
    [[(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], [(9, 9, 9)] * 3 + [(255, 255, 255)]], np.uint8
)
"""Four by two pixels of which no turn or mirror image is the same."""

TURNED = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.transpose(1, 0, 2),
    6: np.rot90(CORNERS, -1),
    7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(CORNERS),
}


def exif(orientation: Any) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def data(folder: Path, format: Format = PICTURES, **settings: Any) -> Dataset:
    return open_dataset(TrainSettings(data=str(folder), **settings), format)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("ending", ["png", "webp"])
def test_orientation(tmp_path: Path, orientation: int, ending: str) -> None:
    lossless: dict[str, Any] = {"lossless": True, "exact": True} if ending == "webp" else {}
    Image.fromarray(CORNERS).save(tmp_path / f"a.{ending}", exif=exif(orientation), **lossless)
    expected = TURNED[orientation]
    height, width = expected.shape[:2]
    read = ImageFile(tmp_path / f"a.{ending}").read(Reading(), width, height, 1)
    assert np.array_equal(read[0], expected)


@pytest.mark.parametrize("orientation", TURNED)
def test_orientation_of_a_jpeg_decides_its_bucket(tmp_path: Path, orientation: int) -> None:
    Image.fromarray(CORNERS).save(tmp_path / "a.jpg", exif=exif(orientation), quality=100, subsampling=0)
    found = data(tmp_path, resolution="64")
    bucket = found.samples[0].bucket
    assert bucket.width / bucket.height == pytest.approx(2 if orientation < 5 else 0.5, rel=0.05)
    exact = data(tmp_path, resolution="4x2" if orientation < 5 else "2x4").pixels(0)
    expected = torch.from_numpy(TURNED[orientation].copy()).permute(2, 0, 1) / 127.5 - 1
    assert exact.shape == expected.shape
    assert (exact - expected).abs().max() < 0.2  # JPEG
    assert not any("EXIF" in note for note in found.notes)


BROKEN = {
    "garbage": b"Exif\0\0garbage!!",
    "cut": exif(6)[:14],
    "no end": exif(6)[:-6],
    "far": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "a type that does not exist": b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIII", 1, 0x112, 99, 1, 6, 0),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_exif_is_ignored_with_a_note(tmp_path: Path, content: bytes) -> None:
    Image.fromarray(CORNERS).save(tmp_path / "a.jpg", exif=content)
    Image.fromarray(CORNERS).save(tmp_path / "b.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = data(tmp_path, resolution="4x2")
        assert found.pixels(0).shape == (3, 2, 4)
    assert [note for note in found.notes if "EXIF" in note] == [
        "a.jpg: has EXIF data that cannot be read: it is taken as upright"
    ]


def test_an_empty_list_of_tags_is_not_broken(tmp_path: Path) -> None:
    Image.fromarray(CORNERS).save(tmp_path / "a.jpg", exif=Image.Exif().tobytes())
    found = data(tmp_path, resolution="4x2")
    with Image.open(tmp_path / "a.jpg") as written:
        assert written.info["exif"]
    assert not any("EXIF" in note for note in found.notes)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_noted(tmp_path: Path, orientation: Any) -> None:
    Image.fromarray(CORNERS).save(tmp_path / "a.jpg", exif=exif(orientation))
    found = data(tmp_path, resolution="4x2")
    assert found.pixels(0).shape == (3, 2, 4)
    assert any(note.startswith("a.jpg: has the EXIF orientation") for note in found.notes)


GREEN = (0, 255, 0)


def transparent(kind: str) -> tuple[Image.Image, list[list[tuple[int, int, int] | None]], dict[str, Any]]:
    """A picture of two by two pixels, one opaque; its colours, None behind transparent ones; options to save it."""
    pixels: list[list[tuple[int, int, int] | None]] = [[GREEN, None], [None, None]]
    if kind == "RGBA":
        made = Image.new("RGBA", (2, 2), (255, 0, 255, 0))
        made.putpixel((0, 0), (*GREEN, 255))
        return made, pixels, {}
    if kind == "palette":
        made = Image.new("P", (2, 2), 1)
        made.putpalette([*GREEN, 255, 0, 255])
        made.putpixel((0, 0), 0)
        return made, pixels, {"transparency": 1}
    if kind == "colour key":
        made = Image.new("RGB", (2, 2), (255, 0, 255))
        made.putpixel((0, 0), GREEN)
        return made, pixels, {"transparency": (255, 0, 255)}
    made = Image.new("LA", (2, 2), (0, 0))
    made.putpixel((0, 0), (100, 255))
    return made, [[(100, 100, 100), None], [None, None]], {}


@pytest.mark.parametrize("background", ["white", "black", "#0000ff"])
@pytest.mark.parametrize("kind", ["RGBA", "palette", "colour key", "grey with alpha"])
def test_transparent_pixels_show_the_background(tmp_path: Path, kind: str, background: str) -> None:
    made, colours, options = transparent(kind)
    made.save(tmp_path / "a.png", **options)
    behind = {"white": (255, 255, 255), "black": (0, 0, 0), "#0000ff": (0, 0, 255)}[background]
    expected = np.array([[colour or behind for colour in row] for row in colours], np.float32)
    found = data(tmp_path, resolution="2x2", background=background).pixels(0)
    assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1)
    larger = data(tmp_path, resolution="8x8", background=background).pixels(0)
    hidden = torch.tensor([255.0, 0, 255]) / 127.5 - 1
    if background == "white" and kind != "grey with alpha":  # no magenta at the seams: red never exceeds green
        assert (larger[0] <= larger[1] + 0.02).all()
    assert (larger - hidden[:, None, None]).abs().amax(0).min() > 0.5


def png(path: Path, depth: int, kind: int, row: bytes, key: bytes) -> Path:
    """Write a PNG of two pixels of a depth, the second of the colour that is declared as transparent."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0))
    body = chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    return path


GREY, COLOURED = 0, 2
KEYS = {
    "grey, 1 bit": (1, GREY, bytes([0b01000000]), struct.pack(">H", 1), 0),
    "grey, 2 bits": (2, GREY, bytes([0b01110000]), struct.pack(">H", 3), 85),
    "grey, 4 bits": (4, GREY, bytes([0x1E]), struct.pack(">H", 14), 17),
    "grey, 8 bits": (8, GREY, bytes([17, 200]), struct.pack(">H", 200), 17),
    "grey, 16 bits": (16, GREY, struct.pack(">2H", 17 * 257, 1000), struct.pack(">H", 1000), 17),
    "RGB, 16 bits": (16, COLOURED, struct.pack(">6H", *[4369] * 3, 9000, 2, 999), struct.pack(">3H", 9000, 2, 999), 17),
}


@pytest.mark.parametrize(("depth", "kind", "row", "key", "shown"), KEYS.values(), ids=KEYS)
def test_transparent_colours_at_each_depth(
    tmp_path: Path, depth: int, kind: int, row: bytes, key: bytes, shown: int
) -> None:
    path = png(tmp_path / "a.png", depth, kind, row, key)
    read = ImageFile(path).read(Reading(background="#0000ff"), 2, 1, 1)
    assert read[0, 0].tolist() == [[shown] * 3, [0, 0, 255]]


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert data(tmp_path, resolution="2x2").pixels(0).unique().tolist() == pytest.approx([204 / 127.5 - 1])


def test_other_kinds_of_pixels(tmp_path: Path) -> None:
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    bits = Image.new("1", (2, 2), 0)
    bits.putpixel((0, 0), 1)
    bits.save(tmp_path / "bit.png")
    Image.fromarray(np.full((2, 2), 65535 // 2, np.uint16)).save(tmp_path / "deep.png")
    Image.new("P", (2, 2), 3).save(tmp_path / "palette.bmp")
    found = data(tmp_path, resolution="2x2")
    shown = {sample.item.name: found.pixels(number) for number, sample in enumerate(found.samples)}
    assert shown["bit.png"][:, 0, 0].tolist() == [1, 1, 1]
    assert shown["bit.png"][:, 1].unique().tolist() == [-1]
    assert shown["deep.png"].abs().max() < 0.01
    assert shown["cmyk.jpg"][0].min() > 0.95
    assert shown["cmyk.jpg"][1:].max() < -0.95
    assert all(pixels.dtype == torch.float32 and pixels.shape == (3, 2, 2) for pixels in shown.values())


@pytest.mark.parametrize("background", ["whitish", "", "#12345", "#ff000080"])
def test_a_background_that_is_no_colour_is_an_error(tmp_path: Path, background: str) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^background must be an opaque colour"):
        data(tmp_path, background=background)


def test_the_middle_is_cut_out() -> None:
    columns = np.zeros((4, 12, 3), np.uint8)
    columns[:, 4:8] = 200
    assert np.array_equal(np.asarray(fit(Image.fromarray(columns), 4, 4)), np.full((4, 4, 3), 200))
    rows = columns.transpose(1, 0, 2)
    assert np.array_equal(np.asarray(fit(Image.fromarray(rows), 4, 4)), np.full((4, 4, 3), 200))
    same = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    assert np.array_equal(np.asarray(fit(Image.fromarray(same), 7, 5)), same)


def noted(found: Dataset, text: str) -> list[str]:
    return [note for note in found.notes if text in note]


def test_changes_of_a_picture_are_noted(tmp_path: Path) -> None:
    picture(tmp_path / "wide.png", (400, 20))
    picture(tmp_path / "small.png", (5, 5))
    picture(tmp_path / "fits.png", (40, 40))
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name in ("moving.png", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    found = data(tmp_path)
    assert noted(found, "smaller than 32x32, enlarged") == ["small.png: smaller than 32x32, enlarged"]
    assert [note.partition(":")[0] for note in noted(found, "cut off")] == ["wide.png"]
    assert noted(found, "animated") == ["moving.png, moving.webp: is animated: its first frame is used"]
    number = next(number for number, one in enumerate(found.samples) if one.item.name == "moving.png")
    assert found.pixels(number)[:, 0, 0].tolist() == [1, -1, -1]


def truncated() -> bytes:
    made = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(made, "JPEG")
    return made.getvalue()[:-800]


def bomb() -> bytes:
    made = io.BytesIO()
    Image.new("1", (8, 8)).save(made, "PNG")
    content = bytearray(made.getvalue())
    content[16:24] = struct.pack(">II", 50000, 50000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "empty.png": b"",
        "text.png": b"hello",
        "short.png": b"\x89PNG\r\n\x1a\n",
        "truncated.jpg": truncated(),
        "bomb.png": bomb(),
        "cut.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
        "cut.bmp": b"BM" + bytes(20),
    }.items(),
)
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        data(tmp_path, resolution="8x8").pixels(0)
    assert str(raised.value).startswith(f"image {tmp_path / name} cannot be read: ")
    assert "\n" not in str(raised.value)
