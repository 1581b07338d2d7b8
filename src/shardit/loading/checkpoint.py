"""Maps the tensors of one component to weight files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shardit.errors import InputError
from shardit.loading.dtypes import file_dtype
from shardit.loading.safetensors_file import Header, Reads, TensorEntry
from shardit.loading.weight_names import choose, variants_among

if TYPE_CHECKING:
    import torch


class Remote(Protocol):
    """Source of weight files that are not on this disk yet."""

    def names(self, folder: str) -> list[str]:
        """Return the plain names of the files in a component folder."""
        ...

    def header(self, file: str) -> Header:
        """Return the header of a weight file ("folder/name") without its data; byte ranges count from the start of the
        data."""
        ...

    def fetch(self, files: list[str]) -> None:
        """Download the named weight files ("folder/name") into the snapshot folder."""
        ...


@dataclass
class Checkpoint:
    """The weights of one component folder; `files` maps tensor name to plain file name.

    sharded: an index names the files. variant: infix of the file names. remote: source of files that are not on this
    disk; `ensure` fetches them.
    """

    folder: Path
    files: dict[str, str]
    sharded: bool
    remote: Remote | None = None
    variant: str | None = None
    _headers: dict[str, Header] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: str | os.PathLike, remote: Remote | None = None, variant: str | None = None) -> Checkpoint:
        """Find the weights of a component folder, of the given variant if the folder has it, without reading any
        tensor.

        Raises InputError for missing or damaged files, UnsupportedError if the folder holds only pickles.
        """
        folder = Path(folder)
        if not folder.is_dir() and remote is None:
            raise InputError(f"{folder} does not exist: download or copy the model again")
        here = os.listdir(folder) if folder.is_dir() else []
        choice = choose({*here, *(remote.names(folder.name) if remote else [])}, str(folder), variant)
        if choice.sharded:
            return cls(folder, _weight_map(folder / choice.name), True, remote, choice.variant)
        opened = cls(folder, {}, False, remote, choice.variant)
        opened.files = dict.fromkeys(opened.header(choice.name).entries, choice.name)
        return opened

    def variants(self) -> list[str]:
        """Return the weight variants in the folder."""
        here = os.listdir(self.folder) if self.folder.is_dir() else []
        return variants_among({*here, *(self.remote.names(self.folder.name) if self.remote else [])})

    @property
    def names(self) -> list[str]:
        """Return the distinct file names, sorted."""
        return sorted(set(self.files.values()))

    def header(self, file: str) -> Header:
        """Return the header of one of the files; fetch it from the hub if the file is not on this disk."""
        if file not in self._headers:
            path = self.folder / file
            if not path.exists() and self.remote is not None:
                return self._headers.setdefault(file, self.remote.header(f"{self.folder.name}/{file}"))
            if not path.exists():
                raise InputError(f"{path} is missing: download or copy the model again")
            self._headers[file] = Header.read(path)
        return self._headers[file]

    def entry(self, key: str) -> TensorEntry:
        """Return the location of tensor `key` in its file. Raises InputError if the index is wrong about it."""
        file = self.files[key]
        found = self.header(file).entries.get(key)
        if found is None:
            raise InputError(
                f"the index of {self.folder} says that {key} is in {file}, but it is not: download the folder again"
            )
        return found

    def ensure(self, files: set[str], reads: Reads | None = None) -> None:
        """Ensure that these files are on this disk and that their headers have true byte ranges."""
        absent = sorted(file for file in files if not (self.folder / file).exists())
        if absent and self.remote is not None:
            self.remote.fetch([f"{self.folder.name}/{file}" for file in absent])
        for file in sorted(files):
            path = self.folder / file
            if not path.exists():
                raise InputError(f"{path} is missing: download or copy the model again")
            # Read again: a header from the hub lacks the offset of the data in the file.
            self._headers[file] = Header.read(path, reads)

    def stored_dtype(self) -> torch.dtype | None:
        """Return the dtype of the first floating tensor in the first file, which transformers calls "auto"."""
        for file in self.names[:1]:
            for entry in self.header(file).entries.values():
                dtype = file_dtype(entry.dtype)
                if dtype is not None and dtype.is_floating_point:
                    return dtype
        return None

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(self.entry(key).nbytes for key in self.files)


def check_variant(variant: str | None, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise InputError if no component has the variant, as in diffusers; a component without it loads its default
    weights."""
    if variant is None or not checkpoints or any(one.variant == variant for one in checkpoints.values()):
        return
    there = sorted({name for one in checkpoints.values() for name in one.variants()})
    advice = f"there is {', '.join(there)}" if there else "leave variant out"
    raise InputError(f"variant: no component of the model has weights of variant {variant!r}; {advice}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        table = json.loads(index.read_text())["weight_map"]
        files = {str(key): str(file) for key, file in table.items()}
    except OSError as error:
        raise InputError(f"cannot read {index} ({error.strerror}): download or copy it again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} has no readable weight_map: download or copy it again") from error
    for file in files.values():
        # An index is untrusted text: it must not point outside its folder.
        if os.path.basename(file) != file or file in ("", ".", "..") or not file.endswith(".safetensors"):
            raise InputError(f"{index} names {file!r}, which is not a safetensors file in its folder: get another copy")
    return files
