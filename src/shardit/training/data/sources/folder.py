"""A folder of images and clips, each with its caption in a text file of the same name."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from shardit.errors import InputError, listed
from shardit.training.data.items import ENDINGS, FoundItems, Item, count, found, media_of, portable
from shardit.training.data.media import shown, unreadable
from shardit.training.data.sources.captions import caption, read_text

CAPTIONS = ".txt"
"""Ending of a caption's file, in small letters."""

_SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")
"""Files and folders that systems put among one's own, in small letters; hidden ones are skipped anyway."""

ROWS = ".jsonl"


def folder_items(folder: Path) -> FoundItems:
    """Return the images and clips of a folder and of those in it. Raises InputError."""
    files, notes = _files(folder)
    media = [path for path in files if media_of(path)]
    if not media:
        rows = next((path for path in files if path.suffix.lower() == ROWS), None)
        hint = f"; give --data {shown(rows)} for its rows" if rows else ""
        raise InputError(f"data {shown(folder)} has no images or clips ({', '.join(ENDINGS)}){hint}")
    texts = [path for path in files if path.suffix.lower() == CAPTIONS]
    pairs = _pairs(folder, media, texts)
    unused = [_name(folder, path) for path in texts if path not in set(pairs.values())]
    if unused:
        notes.append(f"{count(len(unused), 'text belongs', 'texts belong')} to no image or clip: {listed(unused)}")
    others = [_name(folder, path) for path in files if path not in {*media, *texts}]
    if others:
        notes.append(f"{count(len(others), 'other file is', 'other files are')} not read: {listed(others)}")
    items = []
    for path in media:
        text, said = read_text(pairs[path]) if path in pairs else ("", ())
        notes += said
        content = media_of(path)
        assert content is not None
        items.append(Item(_name(folder, path), content, caption(text)))
    return found(items, notes)


def _pairs(folder: Path, media: list[Path], texts: list[Path]) -> dict[Path, Path]:
    """Return the caption's file of each image or clip. Raises InputError if it is not plain which one it is, or if
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
            raise InputError(
                f"{shown(own[0])} and {shown(own[1])} are both the caption of {shown(path)}; take one of them out"
            )
        if own:
            if (other := taken.get(own[0])) is not None:
                way = f"give each its own, as in {shown(path.name)}{CAPTIONS}"
                raise InputError(f"{shown(other)} and {shown(path)} both claim the caption {shown(own[0])}; {way}")
            pairs[path], taken[own[0]] = own[0], path
    without = [shown(path) for path in media if path not in pairs]
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
    files = sorted(_walk(folder, notes), key=lambda path: (_name(folder, path), str(path)))
    return files, notes


def _walk(root: Path, notes: list[str]) -> Iterator[Path]:
    """Yield the files below a folder. Links to folders are followed; a folder that is met again is not read again."""
    seen: dict[str, Path] = {}
    folders = [root]
    while folders:
        folder = folders.pop()
        real = os.path.realpath(folder)
        if real in seen:
            notes.append(
                f"{shown(folder)} is the folder {shown(seen[real])}, which has been read already: it is skipped"
            )
            continue
        seen[real] = folder
        inside = [folder / name for name in _names(folder)]
        below = [path for path in inside if os.path.isdir(path)]  # False for what may not be looked at
        yield from sorted({*inside} - {*below})
        folders += reversed(below)


def _names(folder: Path) -> list[str]:
    """Return the names in a folder that are not hidden, in an order that no file system decides."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except OSError as error:
        raise unreadable("folder", folder, error) from None
    kept = (name for name in names if not name.startswith(".") and name.lower() not in _SYSTEM)
    return sorted(kept, key=lambda name: (portable(name), name))
