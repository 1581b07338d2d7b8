"""Captions in the encodings that people's editors write."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardit.errors import InputError
from shardit.training.data.sources.captions import caption, decoded
from shardit.training.data.sources.find import find_items
from tests.training.data.files import folder

CLEAN = {
    "utf-8": ("a café".encode(), "a café"),
    "a mark of UTF-8": (b"\xef\xbb\xbfa caf\xc3\xa9", "a café"),
    "UTF-16, little": ("a café".encode("utf-16"), "a café"),
    "UTF-16, big": (b"\xfe\xff" + "a café".encode("utf-16-be"), "a café"),
    "UTF-32": ("a café".encode("utf-32"), "a café"),
    "CRLF and blanks": (b"  a cat  \r\nsits \t\r\n\r\n", "a cat\nsits"),
    "old line ends": (b"a cat\rsits\r", "a cat\nsits"),
    "only a mark": (b"\xef\xbb\xbf", ""),
    "blanks": (b" \r\n\t", ""),
    "a mark of UTF-16 and no text": (b"\xff\xfe", ""),
    "other scripts": ("赤い丸 🙂".encode(), "赤い丸 🙂"),
}


@pytest.mark.parametrize(("data", "expected"), CLEAN.values(), ids=CLEAN)
def test_clean_captions(data: bytes, expected: str) -> None:
    text, notes = decoded(data, "a.txt")
    assert (caption(text), notes) == (expected, ())


def test_other_bytes_are_windows_1252_with_a_note(tmp_path: Path) -> None:
    found = find_items(str(folder(tmp_path, {"a.png": None, "a.txt": b"the cat\x92s hat \x97 red"})))
    assert found.items[0].caption == "the cat\u2019s hat \u2014 red"
    assert found.notes == (f"{tmp_path}/a.txt: byte 7 (0x92) is not UTF-8; the file is read as Windows-1252",)


WRONG = {
    b"caf\xe9 \x81": "x/a.txt: byte 3 (0xe9) is not UTF-8, and byte 5 (0x81) is not Windows-1252; save it as UTF-8",
    b"\x81": "x/a.txt: byte 0 (0x81) is not UTF-8, and byte 0 (0x81) is not Windows-1252; save it as UTF-8",
    b"\xef\xbb\xbfa\xff": "x/a.txt: byte 4 is not UTF-8, as its mark says; save it as UTF-8",
    b"\xff\xfea": "x/a.txt: byte 2 is not UTF-16, as its mark says; save it as UTF-8",
    b"\xff\xfe\0\0aa": "x/a.txt: byte 4 is not UTF-32, as its mark says; save it as UTF-8",
    "cat".encode("utf-16-le"): "x/a.txt: character 1 is a null, as in UTF-16 without its mark; save it as UTF-8",
}


@pytest.mark.parametrize(("data", "message"), WRONG.items())
def test_what_has_no_meaning_is_an_error_with_its_place(data: bytes, message: str) -> None:
    with pytest.raises(InputError) as raised:
        decoded(data, "x/a.txt")
    assert str(raised.value) == message


def test_an_error_in_a_caption_comes_with_the_items(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.txt: byte 1 "):
        find_items(str(folder(tmp_path, {"a.png": None, "a.txt": b"a\x81"})))


def test_empty_captions_are_counted(tmp_path: Path) -> None:
    files = {
        "a.png": None,
        "a.txt": b"",
        "b.png": None,
        "b.txt": b"\xef\xbb\xbf \r\n",
        "c.png": None,
        "c.txt": b"cat",
    }
    found = find_items(str(folder(tmp_path / "some", files)))
    assert [item.caption for item in found.items] == ["", "", "cat"]
    assert found.notes == ("2 captions are empty: a.png, b.png",)
    none = find_items(str(folder(tmp_path / "none", {"a.png": None, "b.png": None})))
    assert none.notes == ("all captions are empty: a.png, b.png",)
