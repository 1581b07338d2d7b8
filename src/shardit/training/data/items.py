"""`Item`: one sample of the data, an image or a clip with its caption."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardit.errors import InputError, listed
from shardit.training.data import clips, images
from shardit.training.data.clips import Clip
from shardit.training.data.images import ImageFile
from shardit.training.data.media import Media, shown

ENDINGS = (*images.ENDINGS, *clips.ENDINGS)
"""Endings of the files that are read, in small letters."""


@dataclass(frozen=True)
class Item:
    """An image or a clip with its caption."""

    name: str
    """Identifies it: its path in the data, alike on each machine."""
    media: Media
    caption: str


@dataclass(frozen=True)
class FoundItems:
    """The items of some data, sorted by name, and notes for the user."""

    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()


def found(items: Iterable[Item], notes: Sequence[str] = ()) -> FoundItems:
    """Return items in the order of their names, with a note on empty captions. Raises InputError for a name that two
    have."""
    ordered = sorted(items, key=lambda item: item.name)
    for one, other in itertools.pairwise(ordered):
        if one.name == other.name:
            raise InputError(f"two items of the data have the name {one.name!r}; rename one of the files")
    empty = [item.name for item in ordered if not item.caption]
    if empty:
        captions = "all captions are" if len(empty) == len(ordered) else count(len(empty), "caption is", "captions are")
        notes = [*notes, f"{captions} empty: {listed(empty)}"]
    return FoundItems(tuple(ordered), tuple(notes))


def media_of(path: Path) -> Media | None:
    """Return what a file shows, by its ending; None for other files."""
    ending = path.suffix.lower()
    if ending in images.ENDINGS:
        return ImageFile(path)
    return Clip(path) if ending in clips.ENDINGS else None


def portable(name: str | os.PathLike[str]) -> str:
    """Return a relative path as it is on each machine: composed characters, forward slashes; line breaks and
    bytes that are no text are written out."""
    return unicodedata.normalize("NFC", shown(name).replace(os.sep, "/"))


def count(number: int, one: str, several: str) -> str:
    """Return a number with the word for one or for several."""
    return f"{number} {one if number == 1 else several}"
