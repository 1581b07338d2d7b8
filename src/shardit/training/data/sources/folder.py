"""A folder of pictures and clips, each with its caption in a text file of the same name."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from shardit.errors import InputError
from shardit.training.data.items import ENDINGS, Found, Item, count, found, listed, media_of, portable
from shardit.training.data.media import unreadable
from shardit.training.data.sources.captions import caption, read_text

CAPTIONS = ".txt"
"""Ending of a caption's file, in small letters."""

_SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")
"""Files and folders that systems put among one's own, in small letters; hidden ones are skipped anyway."""

ROWS = ".jsonl"


def folder_items(folder: Path) -> Found:
    """Return the pictures and clips of a folder and of those in it. Raises InputError."""
    files, notes = _files(folder)
    media = [path for path in files if media_of(path)]
    if not media:
        rows = next((path for path in files if path.suffix.lower() == ROWS), None)
        hint = f"; give --data {rows} for its rows" if rows else ""
        raise InputError(f"data {folder} has no pictures or clips ({', '.join(ENDINGS)}){hint}")
    texts = [path for path in files if path.suffix.lower() == CAPTIONS]
    pairs = _pairs(folder, media, texts)
    unused = [_name(folder, path) for path in texts if path not in set(pairs.values())]
    if unused:
        notes.append(f"{count(len(unused), 'text belongs', 'texts belong')} to no picture or clip: {listed(unused)}")
    others = [_name(folder, path) for path in files if path not in {*media, *texts}]
    if others:
        notes.append(f"{count(len(others), 'other file is', 'other files are')} not read: {listed(others)}")
    items = []
    for path in media:
        text, said = read_text(pairs[path]) if path in pairs else ("", ())
        notes += said
        shown = media_of(path)
        assert shown is not None
        items.append(Item(_name(folder, path), shown, caption(text)))
    return found(items, notes)


def _pairs(folder: Path, media: list[Path], texts: list[Path]) -> dict[Path, Path]:
    """Return the caption's file of each picture or clip. Raises InputError if it is not plain which one it is, or if
    some have none; no captions at all are fine."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in texts:
        by_name[_name(folder, path)[: -len(CAPTIONS)]].append(path)
    pairs: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for path in media:
        name = _name(folder, path)
        own = by_name.get(name) or by_name.get(name[: -len(path.suffix)]) or []
        if len(own) > 1:
            raise InputError(f"{own[0]} and {own[1]} are both the caption of {path}; take one of them out")
        if own:
            if (other := taken.get(own[0])) is not None:
                way = f"give each its own, as in {path.name}{CAPTIONS}"
                raise InputError(f"{other} and {path} both claim the caption {own[0]}; {way}")
            pairs[path], taken[own[0]] = own[0], path
    without = [str(path) for path in media if path not in pairs]
    if pairs and without:
        example = Path(without[0]).with_suffix(CAPTIONS).name
        raise InputError(
            f"{count(len(without), 'file has', 'files have')} no caption: {listed(without)}; write it into {example} "
            f"(an empty file for an empty caption)"
        )
    return pairs


def _name(folder: Path, path: Path) -> str:
    return portable(path.relative_to(folder))


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files below a folder in the order of their names, and notes on folders that are skipped."""
    notes: list[str] = []
    files = sorted(_walk(folder, {}, notes), key=lambda path: (_name(folder, path), str(path)))
    return files, notes


def _walk(folder: Path, seen: dict[str, Path], notes: list[str]) -> Iterator[Path]:
    """Yield the files below a folder. Links to folders are followed; a folder that is met again is not read again."""
    real = os.path.realpath(folder)
    if real in seen:
        notes.append(f"{folder} is the folder {seen[real]}, which has been read already: it is skipped")
        return
    seen[real] = folder
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: (portable(entry.name), entry.name))
    except OSError as error:
        raise unreadable("folder", folder, error) from None
    for entry in inside:
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
            continue
        path = folder / entry.name
        if path.is_dir():  # unlike the entry's own, it takes links that lead nowhere
            yield from _walk(path, seen, notes)
        else:
            yield path
