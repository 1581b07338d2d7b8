"""Texts and conversations from JSONL files and text files, with the file and line of each."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardit.errors import InputError, did_you_mean
from shardit.language.request.plain_messages import plain_messages
from shardit.settings.checks import text_problem
from shardit.settings.paths import user_path
from shardit.training.data.items import portable
from shardit.training.data.media import shown
from shardit.training.data.sources.captions import mark_of

ENDINGS = (".jsonl", ".jsonl.gz", ".txt")
"""Ends of the names of files that are read."""

_KEYS = ("text", "messages")


@dataclass(frozen=True)
class TrainingRow:
    """A text or a conversation. name: its file below the folder of the data, and its line. tools: functions that the
    chat template is given."""

    name: str
    text: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None


@dataclass
class TrainingRows:
    """The rows of one setting, in the order of files and lines. empty: names of rows without content. others: names of
    files that are not read."""

    rows: list[TrainingRow] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def read_rows(setting: str, value: str) -> TrainingRows:
    """Return the rows of a file, or of all files of a folder and of the folders in it.

    setting: the name of the setting, for messages. Raises InputError with file and line for what cannot be read, and
    if there is no row with content.
    """
    path, found = user_path(setting, value), TrainingRows()
    if not path.exists():
        raise InputError(f"{setting}: there is no file or folder {value}: give one with {', '.join(ENDINGS)}")
    files = _files(path, found) if path.is_dir() else [path]
    if not files or not str(files[0]).lower().endswith(ENDINGS):
        raise InputError(f"{setting}: {value} has no file for a language model: give {', '.join(ENDINGS)}")
    for file in files:
        name = portable(file.relative_to(path) if path.is_dir() else file.name)
        for row in _rows_of(file, name):
            if row.messages or (row.text is not None and row.text.strip()):
                found.rows.append(row)
            else:
                found.empty.append(row.name)
    if not found.rows:
        raise InputError(f"{setting}: {value} has no row with content ({len(found.empty)} are empty)")
    return found


def _files(folder: Path, found: TrainingRows) -> list[Path]:
    """Return the files to read, sorted by name: the order does not depend on the file system."""
    chosen: list[Path] = []
    for path in sorted(folder.rglob("*"), key=lambda one: one.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        if path.name.lower().endswith(ENDINGS):
            chosen.append(path)
        else:
            found.others.append(portable(name))
    return chosen


def _rows_of(file: Path, name: str) -> Iterator[TrainingRow]:
    content = _content(file)
    if file.name.lower().endswith(".txt"):
        yield TrainingRow(name, text=_decoded(content, name))
        return
    # Only line feeds separate rows: a text may contain other separators of lines.
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{name}:{number}"
        if line.strip():
            yield _row(_decoded(line, where), where)


def _content(file: Path) -> bytes:
    """Return the bytes of a file in UTF-8, without a mark at their beginning."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.name.lower().endswith(".gz") else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{shown(file)} cannot be read ({error}): copy it again, or leave it out") from error
    mark, encoding = mark_of(content)
    content = content[len(mark) :]
    if encoding == "utf-8":
        return content
    try:
        return content.decode(encoding).encode()
    except UnicodeError as error:
        raise InputError(f"{shown(file)} starts as {encoding.upper()} and is not: save it as UTF-8") from error


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise InputError(f"{where} is not UTF-8 (byte 0x{byte:02x} at {error.start}): save it as UTF-8") from error


def _row(line: str, where: str) -> TrainingRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): correct the line") from error
    if not isinstance(value, dict):
        raise InputError(f'{where} must be {{"text": ...}} or {{"messages": [...]}}, got {line:.80}')
    given = [key for key in _KEYS if value.get(key) is not None]
    if len(given) != 1:
        hint = next((text for key in value if (text := did_you_mean(key, _KEYS)) and key not in _KEYS), "")
        has = "both text and messages" if given else "neither text nor messages"
        raise InputError(f"{where} has {has}{hint if not given else ''}: give one of them")
    text, messages, tools = value.get("text"), value.get("messages"), value.get("tools")
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: text must be a string, got {text!r:.80}")
    if messages is not None and not isinstance(messages, list):
        raise InputError(f"{where}: messages must be a list, got {messages!r:.80}")
    try:
        messages = plain_messages(messages)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if problem := text_problem((text, messages, tools)):
        raise InputError(f"{where} must be {problem}")
    return TrainingRow(where, text, messages, tools)
