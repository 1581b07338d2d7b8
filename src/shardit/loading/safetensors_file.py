"""Reads safetensors files: the header, and bytes straight into the memory of a tensor.

No memory map and no second copy: a rank that owns one tenth of a file reads one tenth of it, and afterwards uses memory
for its weights alone.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.core.placement.slices import Slice
from shardit.errors import InputError
from shardit.loading.dtypes import file_bits, file_dtype
from shardit.loading.index import LFS_POINTER

if TYPE_CHECKING:
    import torch

_MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader
_MAX_READ = 1 << 30  # bytes per system call; Linux stops at 2 GiB
_AGAIN = "download or copy it again"


@dataclass
class Reads:
    """Counts reads from disk: `bytes` of tensor data, `headers` bytes of file headers."""

    bytes: int = 0
    headers: int = 0


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its safetensors dtype code, its shape, and its bytes [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """The tensors of one file by name, and the file's free-text metadata."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike, reads: Reads | None = None) -> Header:
        """Read the header of a file. Raises InputError if the file is missing, empty, truncated or not safetensors."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = _header_length(path, file.read(8), size)
                text = file.read(length)
        except OSError as error:
            raise InputError(f"cannot read {path} ({error.strerror or error}): {_AGAIN}") from error
        if reads is not None:
            reads.headers += 8 + length
        return _parse(path, text, data_start=8 + length, size=size)


def _header_length(path: Path, first: bytes, size: int) -> int:
    if size == 0:
        raise InputError(f"{path} is empty: {_AGAIN}")
    if first == LFS_POINTER:
        raise InputError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its repository")
    if size < 8:
        raise InputError(f"{path} is cut short ({size} bytes): {_AGAIN}")
    (length,) = struct.unpack("<Q", first)
    if length > _MAX_HEADER or length < 2:
        raise InputError(f"{path} is not a safetensors file (its header would be {length} bytes): {_AGAIN}")
    if 8 + length > size:
        raise InputError(f"{path} is cut short inside its header ({size} of at least {8 + length} bytes): {_AGAIN}")
    return length


def _parse(path: Path, text: bytes, data_start: int, size: int) -> Header:
    try:
        table: dict[str, Any] = json.loads(text)
        metadata = table.pop("__metadata__", None) or {}
        entries = {name: _entry(raw, data_start) for name, raw in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has a damaged safetensors header ({type(error).__name__}): {_AGAIN}") from error
    for name, entry in entries.items():
        bits = file_bits(entry.dtype)
        wrong_length = bits is not None and entry.nbytes * 8 != math.prod(entry.shape) * bits
        if entry.nbytes < 0 or entry.start < data_start or wrong_length:
            raise InputError(f"{path} has a damaged safetensors header (tensor {name}): {_AGAIN}")
    end = max((entry.end for entry in entries.values()), default=data_start)
    if end > size:
        raise InputError(f"{path} is cut short ({size} of {end} bytes): {_AGAIN}")
    return Header(entries, metadata)


def _entry(raw: dict[str, Any], data_start: int) -> TensorEntry:
    start, end = raw["data_offsets"]
    shape = tuple(int(n) for n in raw["shape"])
    return TensorEntry(str(raw["dtype"]), shape, data_start + int(start), data_start + int(end))


def read_into(
    source: int | str | os.PathLike, ranges: Iterable[tuple[int, torch.Tensor]], reads: Reads | None = None
) -> None:
    """Fill contiguous CPU tensors with a file's bytes; `ranges` contains (first byte in the file, tensor) pairs.

    source: an open file descriptor or a path. Raises InputError if the file ends too early.
    """
    if not isinstance(source, int):
        with _opened(source) as descriptor:
            return read_into(descriptor, ranges, reads)
    for start, tensor in ranges:
        memory = _memory(tensor)
        _fill(source, start, memory)
        if reads is not None:
            reads.bytes += len(memory)
    return None


def read_slice(
    path: str | os.PathLike, entry: TensorEntry, part: Slice | None, tensor: torch.Tensor, reads: Reads | None = None
) -> None:
    """Fill a contiguous CPU tensor with a slice of one tensor of a file (None: all of it), in the file's dtype.

    Only the bytes of the slice are read: one run for each segment along dimension 0, else one for each row.
    """
    memory = _memory(tensor)
    with _opened(path) as descriptor:
        done = 0
        for start, length in _runs(entry, part):
            _fill(descriptor, start, memory[done : done + length])
            done += length
    if reads is not None:
        reads.bytes += done


def _runs(entry: TensorEntry, part: Slice | None) -> Iterator[tuple[int, int]]:
    """Yield (first byte, number of bytes) of the pieces of the file that make up a slice, in order."""
    if part is None:
        yield entry.start, entry.nbytes
        return
    rows = math.prod(entry.shape[: part.dim])
    row = entry.nbytes // max(rows, 1)
    step = row // max(entry.shape[part.dim], 1)
    for number in range(rows):
        for start, length in part.segments:
            yield entry.start + number * row + start * step, length * step


def read_tensor(
    path: str | os.PathLike, entry: TensorEntry, rows: slice | None = None, reads: Reads | None = None
) -> torch.Tensor:
    """Read one tensor of a file, or some of its rows (dimension 0, step 1), to the CPU in the file's dtype.

    Only the bytes of those rows are read. Raises InputError for a dtype that torch lacks or a truncated file.
    """
    import torch

    dtype = file_dtype(entry.dtype)
    if dtype is None:
        raise InputError(f"{path} holds numbers of format {entry.dtype}, which torch cannot read: use other weights")
    shape, start = entry.shape, entry.start
    if rows is not None:
        if not shape:
            raise ValueError("a number has no rows")
        first, last, step = rows.indices(shape[0])
        if step != 1:
            raise ValueError("rows must be consecutive")
        start += first * (entry.nbytes // max(shape[0], 1))
        shape = (max(last - first, 0), *shape[1:])
    tensor = torch.empty(shape, dtype=dtype)
    read_into(path, [(start, tensor)], reads)
    return tensor


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[int]:
    """Open a file and yield its descriptor; errors of opening and of files that end too early name the file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): {_AGAIN}") from error
    try:
        yield descriptor
    except _Short as error:
        raise InputError(f"{path} is cut short ({error}): {_AGAIN}") from error
    finally:
        os.close(descriptor)


class _Short(InputError):
    """The file ends before the range does."""


def _memory(tensor: torch.Tensor) -> memoryview:
    import torch

    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("can only read into a contiguous CPU tensor")
    # Flatten first: a number (shape ()) cannot be viewed as bytes.
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _fill(descriptor: int, start: int, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        got = os.preadv(descriptor, [memory[done : done + _MAX_READ]], start + done)
        if got == 0:
            raise _Short(f"byte {start + done} of {start + len(memory)}")
        done += got
