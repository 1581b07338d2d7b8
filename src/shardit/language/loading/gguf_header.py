"""The header of a GGUF file, as transformers reads it; imports no torch."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardit.errors import InputError

_ONE_AT_A_TIME = threading.RLock()


@functools.lru_cache(maxsize=1)
def _parsed(reader: type, path: str, changed: int) -> Any:
    """The header of a file, and its tensors as mapped memory. changed: when the file was written."""
    return reader(path)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Meanwhile transformers parses the header of a file and makes the table of names once, rather than for each use
    and each module: of 30 layers and a vocabulary of 49,152 these take 3 and 6 seconds."""
    import gguf

    reader, table = gguf.GGUFReader, gguf.get_tensor_name_map
    with _ONE_AT_A_TIME:
        gguf.GGUFReader = lambda path: _parsed(reader, str(path), os.stat(path).st_mtime_ns)  # pyright: ignore
        gguf.get_tensor_name_map = functools.cache(table)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, table


def check_package(path: Path) -> None:
    """Raise InputError where the package that reads GGUF files is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path} needs the package gguf: pip install gguf")
