"""Each picture and clip of a folder is one item with its own caption, in an order that no file system decides."""

from __future__ import annotations

import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from shardit.errors import InputError
from shardit.training.data.items import FoundItems
from shardit.training.data.media import Reading
from shardit.training.data.sources.find import find_items
from tests.training.data.files import folder, picture

MEDIA = ("a.jpg", "a.png", "a.b.jpg", "a.c.jpg", "a.mp4")


def found(root: Path) -> FoundItems:
    return find_items(str(root))


def captions(root: Path) -> dict[str, str]:
    return {item.name: item.caption for item in found(root).items}


def test_names_do_not_collide(tmp_path: Path) -> None:
    files: dict[str, str | bytes | None] = {}
    for place in ("one", "two"):
        files |= {f"{place}/{name}": None for name in MEDIA}
        files |= {f"{place}/{name}.txt": f"{name} in {place}" for name in MEDIA}
        files |= {f"{place}/.DS_Store": b"\0", f"{place}/Thumbs.db": b"\0", f"{place}/.hidden/b.png": b"not a picture"}
    files |= {
        "one/with blanks  .png": None,
        "one/with blanks  .txt": "blanks",
        "two/赤 い.png": None,
        "two/赤 い.txt": "赤",
    }
    root = folder(tmp_path, files)
    expected = {f"{place}/{name}": f"{name} in {place}" for place in ("one", "two") for name in MEDIA}
    assert captions(root) == {**expected, "one/with blanks  .png": "blanks", "two/赤 い.png": "赤"}
    assert found(root).notes == ()
    digests = [item.media.digest() for item in found(root).items]
    assert len(set(digests)) == len(digests) == 12


def test_captions_by_the_name_without_its_ending(tmp_path: Path) -> None:
    files = {"a.jpg": None, "a.txt": "a", "a.b.jpg": None, "a.b.txt": "a.b", "B.PNG": None, "B.TXT": "B"}
    assert captions(folder(tmp_path, files)) == {"a.jpg": "a", "a.b.jpg": "a.b", "B.PNG": "B"}


@pytest.mark.parametrize(
    ("files", "both"),
    [
        (("a.jpg", "a.png", "a.txt"), ("a.jpg", "a.png")),
        (("a.jpg", "a.mp4", "a.txt"), ("a.jpg", "a.mp4")),
        (("a.jpg", "a.JPG", "a.txt"), ("a.JPG", "a.jpg")),
        (("a.jpg", "a.jpg.png", "a.jpg.txt"), ("a.jpg", "a.jpg.png")),
        (("in/a.jpg", "in/a.png", "in/a.txt"), ("in/a.jpg", "in/a.png")),
    ],
)
def test_two_that_claim_one_caption(tmp_path: Path, files: tuple[str, ...], both: tuple[str, str]) -> None:
    root = folder(tmp_path, {name: "a text" if name.endswith(".txt") else None for name in files})
    with pytest.raises(InputError) as raised:
        found(root)
    first, second = (root / name for name in both)
    caption = root / next(name for name in files if name.endswith(".txt"))
    assert str(raised.value) == (
        f"{first} and {second} both claim the caption {caption}; give each its own, as in {second.name}.txt"
    )


def test_captions_elsewhere_are_no_concern(tmp_path: Path) -> None:
    files = {"one/a.png": None, "one/a.txt": "1", "two/a.png": None, "two/a.txt": "2", "a.png": None, "a.txt": "0"}
    assert captions(folder(tmp_path, files)) == {"a.png": "0", "one/a.png": "1", "two/a.png": "2"}


def test_two_captions_of_one_picture(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a.png": None, "a.txt": "1", "a.TXT": "2"})
    with pytest.raises(InputError, match=r"a\.TXT and .*a\.txt are both the caption of .*a\.png; take one of them out"):
        found(root)


def test_a_picture_without_its_caption_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a.png": None, "a.txt": "a cat", "b.png": None, "in/c.png": None})
    with pytest.raises(InputError) as raised:
        found(root)
    assert str(raised.value) == (
        f"2 files have no caption: {root}/b.png, {root}/in/c.png; write it into b.txt "
        "(an empty file for an empty caption)"
    )


def test_what_is_not_read_is_noted(tmp_path: Path) -> None:
    files = {"a.png": None, "a.txt": "a cat", "b.txt": "?", "LICENSE": "?", "c.heic": "?", "d.json": "?", "e.tif": "?"}
    assert found(folder(tmp_path, files)).notes == (
        "1 text belongs to no image or clip: b.txt",
        "4 other files are not read: LICENSE, c.heic, d.json and 1 more",
    )


def test_a_text_that_another_caption_replaces_is_noted(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a.png": None, "a.txt": "short", "a.png.txt": "own"})
    assert captions(root) == {"a.png": "own"}
    assert found(root).notes == ("1 text belongs to no image or clip: a.txt",)


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["b/a.png", "B.png", "a-b.png", "a.png", "a/b.png", "a b.png", "é.png", "z.png", "10.png", "9.png"]
    root = folder(tmp_path, dict.fromkeys(names))
    scandir = os.scandir
    orders = set()
    for seed in range(5):

        class Shuffled:
            def __init__(self, place: Any, seed: int = seed):
                with scandir(place) as entries:
                    self.entries = list(entries)
                random.Random(seed).shuffle(self.entries)

            def __enter__(self) -> Any:
                return iter(self.entries)

            def __exit__(self, *_: Any) -> None: ...

        monkeypatch.setattr(os, "scandir", Shuffled)
        orders.add(tuple(item.name for item in found(root).items))
    assert orders == {tuple(sorted(names))}


def test_composed_and_decomposed_names_are_one_name(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "é")
    assert captions(folder(tmp_path / "1", {f"{apart}.png": None, "é.txt": "e"})) == {"é.png": "e"}
    assert captions(folder(tmp_path / "2", {"é.png": None, f"{apart}.txt": "e"})) == {"é.png": "e"}
    with pytest.raises(InputError, match=r"two items of the data have the name 'é\.png'"):
        found(folder(tmp_path / "3", {"é.png": None, f"{apart}.png": None}))


ODD = ["tab\t.png", "new\nline.png", "'\"`$.png", "-rf.png", " .png", "a..png", "%s{}.png", "🙂.png", "赤\u3000い.png"]


def test_odd_names(tmp_path: Path) -> None:
    root = folder(tmp_path, dict.fromkeys(ODD))
    assert sorted(captions(root)) == sorted(["tab\\t.png", "new\\nline.png", *ODD[2:]])
    for item in found(root).items:
        assert item.media.read(Reading(), 4, 4, 1).shape == (1, 4, 4, 3)


def test_errors_and_notes_of_odd_names_are_one_line_of_text(tmp_path: Path) -> None:
    place = os.fsdecode(b"odd\n\xff")
    root = folder(tmp_path / place, {"a.png": b"", "a.txt": b"\x92"})
    (item,) = found(root).items
    assert found(root).notes[0].startswith(f"{tmp_path}/odd\\n\\xff/a.txt: byte 0")
    with pytest.raises(InputError) as raised:
        item.media.extent(Reading())
    assert f"image {tmp_path}/odd\\n\\xff/a.png cannot be read: the file is empty" in str(raised.value)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    (item,) = found(tmp_path).items
    assert item.name == "\\xff.png"
    assert item.name.encode()
    assert item.media.extent(Reading()).width == 8


def test_links(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"in/a.png": None, "in/deep/b.png": None})
    folder(tmp_path / "elsewhere", {"c.png": None})
    (root / "in/deep/loop").symlink_to(root)
    (root / "more").symlink_to(tmp_path / "elsewhere")
    (root / "self").symlink_to(root / "self")
    (root / "in/again.png").symlink_to(root / "in/a.png")
    one = found(root)
    assert [item.name for item in one.items] == ["in/a.png", "in/again.png", "in/deep/b.png", "more/c.png"]
    assert one.notes[0] == f"{root}/in/deep/loop is the folder {root}, which has been read already: it is skipped"


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    (item,) = found(tmp_path).items
    with pytest.raises(InputError, match=r"^image .*a\.png cannot be read: No such file or directory"):
        item.media.extent(Reading())


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({}, ""),
        ({"notes.txt": "a"}, ""),
        ({".a.png": None}, ""),
        ({"rows.jsonl": "{}"}, "; give --data {}/rows.jsonl for its rows"),
    ],
)
def test_a_folder_without_media(tmp_path: Path, files: dict[str, Any], hint: str) -> None:
    with pytest.raises(InputError) as raised:
        found(folder(tmp_path, files))
    assert str(raised.value) == (
        f"data {tmp_path} has no images or clips (.png, .jpg, .jpeg, .webp, .bmp, .mp4, .mov, .webm, .mkv, .gif)"
        + hint.format(tmp_path)
    )


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path, {"a.png": None, "closed/b.png": None})
    scandir = os.scandir

    def refusing(place: Any) -> Any:
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)  # root may read all
    with pytest.raises(InputError, match=r"^folder .*/closed cannot be read: Permission denied; "):
        found(root)


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path, {"a.png": None, "b.mp4": None})
    items = found(root).items

    def refuse(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("av.open", refuse)
    for item, kind in zip(items, ("image", "clip"), strict=True):
        with pytest.raises(InputError) as raised:
            item.media.extent(Reading())
        assert str(raised.value).startswith(f"{kind} {root}/{item.name} cannot be read: Permission denied; replace it")


@pytest.mark.parametrize(
    ("source", "message"),
    {
        "": "data is missing; give a folder",
        "/no/such/folder": "data /no/such/folder does not exist; give a folder",
        __file__: f"data {__file__} is a file of another kind; give a folder",
        "shapes:": "data shapes: must be one of shapes:still, shapes:moving, shapes:centred, shapes:diagonal",
        "shapes:spinning": "data shapes:spinning must be one of shapes:still",
        "shapes:moving:0": "data shapes:moving:0: the number of items must be from 1 to 10000000",
        "shapes:moving:": "data shapes:moving:: the number",
        "shapes:moving:²": "data shapes:moving:²: the number",
        "a\0b": "data 'a\\x00b' holds a null character",
    }.items(),
)
def test_other_sources_are_errors(source: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        find_items(source)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
