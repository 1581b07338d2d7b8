"""Rows of JSONL files, and of data sets of the package `datasets`."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shardit.errors import InputError
from shardit.training.data.dataset import open_dataset
from shardit.training.data.items import FoundItems
from shardit.training.data.sources.find import find_items
from shardit.training.settings import TrainSettings
from tests.training.data.files import PICTURES, folder


def rows(root: Path, *lines: Any, files: tuple[str, ...] = ("a.png", "in/b.png", "c.mp4")) -> Path:
    folder(root, dict.fromkeys(files))
    path = root / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def found(path: Path) -> FoundItems:
    return find_items(str(path))


def test_rows(tmp_path: Path) -> None:
    path = rows(
        tmp_path,
        {"file": "in/b.png", "caption": " two lines \r\nof text "},
        "",
        {"image": "a.png", "text": "a cat\u2028sits", "width": 8},
        {"video": "c.mp4", "text": ""},
        {"file_name": str(tmp_path / "a.png"), "caption": "by its whole path", "text": None},
        {"file": "a.png", "text": "another caption"},
        "  ",
    )
    assert {item.name: item.caption for item in found(path).items} == {
        "in/b.png": "two lines\nof text",
        "a.png": "a cat\nsits",
        "c.mp4": "",
        str(tmp_path / "a.png"): "by its whole path",
        "a.png#2": "another caption",
    }
    assert found(path).notes == ("1 caption is empty: c.mp4",)


def test_rows_with_a_mark_and_other_line_ends(tmp_path: Path) -> None:
    path = rows(tmp_path, {"file": "a.png", "text": "a"}, {"file": "in/b.png", "text": "b"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [item.caption for item in found(path).items] == ["a", "b"]


WRONG = {
    "not JSON": ("{", ":1 is not JSON: Expecting property name"),
    "a list": ("[]", ":1 must be an object, as in "),
    "no file": ({"text": "a"}, ":1 lacks the file; its key is one of file, image, video, file_name"),
    "no caption": ({"file": "a.png"}, ":1 lacks the caption; its key is one of caption, text"),
    "null": ({"file": "a.png", "text": None}, ":1 lacks the caption"),
    "two files": ({"image": "a.png", "video": "c.mp4", "text": ""}, ":1 has both image and video; keep one of them"),
    "two captions": ({"file": "a.png", "text": "", "caption": ""}, ":1 has both caption and text; keep one of them"),
    "a number": ({"file": "a.png", "text": 3}, ":1: text must be a text, got 3"),
    "half characters": ({"file": "a.png", "text": "\ud83d"}, ":1: text must be valid text in UTF-8"),
    "another kind": (
        {"file": "a.tif", "text": ""},
        ":1: 'a.tif' is no image or clip; its name must end in one of .png",
    ),
    "an address": ({"file": "https://a.b/c.png", "text": ""}, ":1: https://a.b/c.png is an address; download it"),
    "a folder": ({"file": "in", "text": ""}, ":1: 'in' is no image or clip"),
    "nothing": ({"file": "", "text": ""}, ":1: '' is no image or clip"),
    "a null": ({"file": "a\0.png", "text": ""}, ":1 "),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = rows(tmp_path, row, {"file": "a.png", "text": ""})
    with pytest.raises(InputError) as raised:
        found(path)
    assert str(raised.value).startswith(f"{path}{message}")
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = rows(tmp_path, {"file": "a.png", "text": ""}, "", {"file": "in/gone.png", "text": ""})
    with pytest.raises(InputError) as raised:
        found(path)
    assert str(raised.value) == f"{path}:3: {tmp_path}/in/gone.png does not exist; correct the path"


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data .*rows\.jsonl has no rows"):
        found(rows(tmp_path, "", " "))


class Table:
    """As much of a data set of `datasets` as is used."""

    def __init__(self, **columns: list[Any]):
        self.columns = columns
        self.column_names = list(columns)

    def __getitem__(self, key: Any) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: one[key] for name, one in self.columns.items()}


def with_datasets(monkeypatch: pytest.MonkeyPatch, table: Any) -> list[tuple[str, str]]:
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        if isinstance(table, Exception):
            raise table
        return table

    made = types.ModuleType("datasets")
    made.load_dataset = load_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", made)
    return asked


def test_a_data_set_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Image.new("RGBA", (4, 2), (255, 0, 255, 0)), Image.fromarray(np.zeros((2, 4), np.uint8))]
    asked = with_datasets(monkeypatch, Table(image=pictures, text=["a cat ", None], other=[1, 2]))
    found = open_dataset(TrainSettings(data="hf:me/pictures:held", resolution="4x2"), PICTURES)
    assert asked == [("me/pictures", "held")]
    assert [sample.item.caption for sample in found.samples] == ["a cat", ""]
    assert found.pixels(0).unique().tolist() == [1]
    assert found.pixels(1).unique().tolist() == [-1]
    assert len({found.key(0), found.key(1)}) == 2
    assert found.identity() == open_dataset(TrainSettings(data="hf:x", resolution="4x2"), PICTURES).identity()
    assert asked[1] == ("x", "train")


def palette(colour: list[int]) -> Image.Image:
    """A picture whose pixels are all 0, of a colour of its own."""
    made = Image.new("P", (2, 2), 0)
    made.putpalette(colour)
    return made


def grey(**info: Any) -> Image.Image:
    """A picture of one grey and one black pixel, with a declared transparency."""
    made = Image.fromarray(np.array([[0, 128]], np.uint8))
    made.info.update(info)
    return made


def turned(orientation: int) -> Image.Image:
    """A picture with an EXIF orientation."""
    made = Image.fromarray(np.array([[0, 128]], np.uint8))
    made.getexif()[0x0112] = orientation
    return made


@pytest.mark.parametrize(
    "pictures",
    [
        (palette([255, 0, 0]), palette([0, 255, 0])),
        (grey(), grey(transparency=0)),
        (turned(1), turned(3)),
        (Image.new("RGBA", (2, 2), (9, 9, 9, 0)), Image.new("RGBA", (2, 2), (9, 9, 9, 255))),
    ],
)
def test_rows_that_look_different_have_different_keys(
    pictures: tuple[Image.Image, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_datasets(monkeypatch, Table(image=[*pictures, pictures[0].copy()], text=["a", "a", "a"]))
    found = open_dataset(TrainSettings(data="hf:x", resolution="2x2", background="#102030"), PICTURES)
    assert not found.pixels(0).equal(found.pixels(1))
    assert found.key(0) != found.key(1)
    assert found.key(0) == found.key(2)


def test_a_row_without_a_picture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in (
        (None, "row 1 of the data has no image in the column image; take it out"),
        ({"bytes": b""}, "row 1 of the data has a dict, not an image, in the column image; take it out"),
    ):
        with_datasets(monkeypatch, Table(image=[Image.new("RGB", (2, 2)), content], text=["a", "b"]))
        with pytest.raises(InputError) as raised:
            open_dataset(TrainSettings(data="hf:x", resolution="2x2"), PICTURES)
        assert str(raised.value) == message
    with_datasets(monkeypatch, Table(image=[Image.new("F", (2, 2))], text=["a"]))
    data = open_dataset(TrainSettings(data="hf:x", resolution="2x2"), PICTURES)
    with pytest.raises(InputError, match=r"^row 0 of the data cannot be read: an image with floating-point values"):
        data.pixels(0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Table(image=[], label=[]), "data hf:x needs a column image and one of caption or text, has image, label"),
        (Table(text=[]), "data hf:x needs a column image and one of caption or text, has text"),
        (ValueError("no such\nthing"), "data hf:x cannot be loaded: no such"),
        (Table(image=[], text=[]), "data hf:x has no rows"),
    ],
)
def test_a_data_set_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, table: Any, message: str) -> None:
    with_datasets(monkeypatch, table)
    with pytest.raises(InputError) as raised:
        find_items("hf:x")
    assert str(raised.value) == message


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardit.loading.missing_packages.is_missing", lambda package: package == "datasets")
    with pytest.raises(InputError, match=r"^the module datasets is not installed; pip install datasets$"):
        find_items("hf:x")
