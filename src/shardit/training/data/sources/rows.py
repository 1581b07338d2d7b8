"""A JSONL file: one row for each image or clip, with its file and its caption."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from shardit.errors import InputError
from shardit.settings.checks import text_problem
from shardit.settings.paths import check_name
from shardit.training.data.items import ENDINGS, FoundItems, Item, found, media_of, portable
from shardit.training.data.media import shown
from shardit.training.data.sources.captions import caption, read_text

FILES = ("file", "image", "video", "file_name")
"""Keys of a file's path, which counts from the folder of the JSONL file; the last one is that of image folders of
the package `datasets`."""

TEXTS = ("caption", "text")
"""Keys of a caption."""


def row_items(path: Path) -> FoundItems:
    """Return the items of a JSONL file. Raises InputError, which names the line."""
    text, notes = read_text(path)
    items: list[Item] = []
    times: Counter[str] = Counter()
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            item = _item(path, f"{shown(path)}:{number}", line)
            times[item.name] += 1
            # The same file may come with several captions.
            name = item.name if times[item.name] == 1 else f"{item.name}#{times[item.name]}"
            items.append(Item(name, item.media, item.caption))
    if not items:
        raise InputError(f"data {shown(path)} has no rows")
    return found(items, notes)


def _item(path: Path, place: str, line: str) -> Item:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f'{place} must be an object, as in {{"file": "a.png", "caption": "a cat"}}')
    given = _text(place, row, FILES, "the file")
    if given.partition("://")[0] in ("http", "https"):
        raise InputError(f"{place}: {given} is an address; download it and give the file")
    file = path.parent / given
    check_name(place, file)
    media = media_of(file)
    if media is None:
        raise InputError(f"{place}: {given!r} is no image or clip; its name must end in one of {', '.join(ENDINGS)}")
    if not file.is_file():
        raise InputError(f"{place}: {shown(file)} does not exist; correct the path")
    return Item(portable(given), media, caption(_text(place, row, TEXTS, "the caption")))


def _text(place: str, row: dict[str, Any], keys: tuple[str, ...], what: str) -> str:
    there = [key for key in keys if row.get(key) is not None]
    if not there:
        raise InputError(f"{place} lacks {what}; its key is one of {', '.join(keys)}")
    if len(there) > 1:
        raise InputError(f"{place} has both {there[0]} and {there[1]}; keep one of them")
    if not isinstance(row[there[0]], str):
        raise InputError(f"{place}: {there[0]} must be a text, got {row[there[0]]!r:.80}")
    if problem := text_problem(row[there[0]]):
        raise InputError(f"{place}: {there[0]} must be {problem}")
    return row[there[0]]
