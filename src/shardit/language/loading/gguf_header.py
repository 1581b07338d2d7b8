"""The header of a GGUF file, as transformers reads it; imports no torch."""

from __future__ import annotations

import functools
import importlib.util
import os
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shardit.errors import InputError

_ONE_AT_A_TIME = threading.RLock()


_LENGTH = struct.Struct("<Q")


def _texts(data: Any, at: int, count: int) -> list[Any]:
    """Return the length and the bytes of each of `count` texts that begin at `at`."""
    parts, raw = [], memoryview(data)
    for _ in range(count):
        end = at + 8 + _LENGTH.unpack_from(raw, at)[0]
        parts += [data[at : at + 8].view("uint64"), data[at + 8 : end]]
        at = end
    return parts


@functools.cache
def _fast(reader: Any) -> Any:
    """gguf's reader with plain arrays instead of memmaps, which take most of its time, and a short way for long arrays,
    such as a vocabulary."""
    from gguf import GGUFValueType

    class FastReader(reader):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(mapped.__class__.__base__)  # ndarray

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            native = self.byte_order == "I" and sys.byteorder == "little"
            if raw_type != GGUFValueType.ARRAY or not native:
                return super()._get_field_parts(orig_offs, raw_type)
            head = [self._get(orig_offs, "uint32"), self._get(orig_offs + 4, "uint64")]
            kind, count, begin = GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
            if kind == GGUFValueType.STRING:
                parts, every = _texts(self.data, begin, count), 2
            elif kind in self.gguf_scalar_to_np:
                parts, every = [*self._get(begin, self.gguf_scalar_to_np[kind], count).reshape(-1, 1)], 1
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            whole = [*head, *parts]
            kinds = [GGUFValueType.ARRAY, kind] if count else [GGUFValueType.ARRAY]
            return sum(part.nbytes for part in whole), whole, list(range(1 + every, len(whole), every)), kinds

    return FastReader


@functools.lru_cache(maxsize=1)
def _parsed(reader: type, path: str, changed: int) -> Any:
    """Return the header of a file, and its tensors as mapped memory. changed: when the file was written."""
    return _fast(reader)(path)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Meanwhile transformers parses the header of a file and makes the table of names once, rather than for each use
    and each module: of 30 layers and a vocabulary of 49,152 these take 0.4 (gguf's own reader: 3) and 6 seconds."""
    import gguf

    with _ONE_AT_A_TIME:
        reader, table = gguf.GGUFReader, gguf.get_tensor_name_map
        if not isinstance(reader, type):  # in the same thread already
            yield
            return
        gguf.GGUFReader = lambda path: _parsed(reader, str(path), os.stat(path).st_mtime_ns)  # pyright: ignore
        gguf.get_tensor_name_map = functools.cache(table)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, table


_SCALARS: dict[int, str] = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9
"""Types of values, by their numbers in the format."""


def read_values(path: Path) -> dict[str, Any]:
    """Return the texts and numbers that a header states before the vocabulary, and reads no more of it: it takes
    milliseconds. Of a damaged or big-endian file, only those before what cannot be read."""
    found: dict[str, Any] = {}
    with open(path, "rb") as file:

        def read(form: str) -> Any:
            return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

        def value(kind: int) -> Any:
            if kind == _ARRAY:
                return [value(each) for each, count in [(read("I"), read("Q"))] for _ in range(count)]
            return file.read(read("Q")).decode() if kind == _TEXT else read(_SCALARS[kind])

        with suppress(struct.error, KeyError, ValueError, OverflowError, MemoryError):
            file.seek(4)
            if read("I") in (2, 3):  # versions
                _, count = read("Q"), read("Q")
                for _ in range(count):
                    name, kind = value(_TEXT), read("I")
                    if name.startswith("tokenizer."):
                        break
                    found[name] = value(kind)
    return found


def check_magic(path: Path) -> None:
    """Raise InputError if a file is no GGUF file by its first bytes."""
    try:
        with open(path, "rb") as file:
            begin = file.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give another file") from error
    if begin != b"GGUF":
        raise InputError(f"{path} is no GGUF file (it does not begin with GGUF): download or copy it again")


def check_package(path: Path) -> None:
    """Raise InputError if the package that reads GGUF files is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path} needs the package gguf: pip install gguf")
