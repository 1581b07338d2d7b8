"""Texts of captions: the encodings that people's editors write, without marks and trailing blanks."""

from __future__ import annotations

import codecs
import errno
from pathlib import Path

from shardit.errors import InputError
from shardit.training.data.media import shown, unreadable

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is the first half of this
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Marks at the start of a file and the encoding that each stands for."""


def read_text(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the text of a file and notes about it, which name the file. Raises InputError."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(errno.EINVAL, "it is not a plain file")
        data = path.read_bytes()
    except OSError as error:
        raise unreadable("file", path, error) from None
    return decoded(data, shown(path))


def caption(text: str) -> str:
    """Return a caption as it is trained: lines end in a newline, blanks at the ends of lines and of the text go."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def mark_of(data: bytes) -> tuple[bytes, str]:
    """Return the mark at the start of a file's bytes, and the encoding that it stands for: UTF-8 if there is none."""
    return next(((mark, one) for mark, one in _MARKS if data.startswith(mark)), (b"", "utf-8"))


def decoded(data: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """Return the text of a file's bytes and notes about it: UTF-8, that of its mark, or else Windows-1252. Raises
    InputError with the position of a byte that is none of these."""
    mark, encoding = mark_of(data)
    notes: tuple[str, ...] = ()
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        if mark:
            meant = encoding.upper().removesuffix("-LE").removesuffix("-BE")
            raise InputError(f"{name}: byte {place} is not {meant}, as its mark says; save it as UTF-8") from None
        text = _western(data, name, place)
        notes = (f"{name}: byte {place} (0x{data[place]:02x}) is not UTF-8; the file is read as Windows-1252",)
    if (place := text.find("\0")) >= 0:
        raise InputError(f"{name}: character {place} is a null, as in UTF-16 without its mark; save it as UTF-8")
    return text, notes


def _western(data: bytes, name: str, place: int) -> str:
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError as error:
        wrong = f"byte {place} (0x{data[place]:02x}) is not UTF-8, and byte {error.start} (0x{data[error.start]:02x})"
        raise InputError(f"{name}: {wrong} is not Windows-1252; save it as UTF-8") from None
