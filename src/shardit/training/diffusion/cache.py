"""Latents and prompt embeddings on disk: made once, by all ranks together, one file for each entry."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardit.core.comm.group import GroupCoordinator
from shardit.errors import InputError, first_line
from shardit.settings.environment import PROGRESS, switch
from shardit.training.data.media import file_digest

FORMAT = 1
"""Changes when an entry of the same origin would have other contents."""

_LINES = 10
"""Lines of progress if standard error is no terminal, about."""


@dataclass(frozen=True)
class Entry:
    """One file of a cache. made_of: everything that its contents depend on, as JSON, which the file repeats."""

    kind: str
    made_of: Mapping[str, Any]
    name: str
    """Name of its source, for errors."""

    @property
    def key(self) -> str:
        """The name of the file: a digest of what it is made of."""
        return hashlib.sha256(self.origin.encode()).hexdigest()[:32]

    @property
    def origin(self) -> str:
        """Inputs of the entry, as JSON."""
        return json.dumps({"format": FORMAT, "kind": self.kind, **self.made_of}, sort_keys=True, default=str)


class SampleCache:
    """A folder of entries."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, entry: Entry) -> Path:
        """Return the file of an entry."""
        return self.folder / entry.kind / f"{entry.key}.safetensors"

    def read(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Return the tensors of an entry. Raises InputError if the file is gone or damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.path(entry)
        try:
            with safe_open(str(path), "pt") as file:
                if (file.metadata() or {}).get("made_of") != entry.origin:
                    raise InputError(f"{path} is an entry of something else: delete it, and it is made again")
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} (of {entry.name}) cannot be read: delete it, and it is made again") from error

    def has(self, entry: Entry) -> bool:
        """Return whether an entry is there and whole."""
        try:
            return self.path(entry).exists() and bool(self.read(entry))
        except InputError:
            return False

    def write(self, entry: Entry, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write an entry under another name, and rename it when it is on the disk."""
        from safetensors.torch import save_file

        path = self.path(entry)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: one.contiguous() for name, one in tensors.items()}, partial, {"made_of": entry.origin})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def missing(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries that are not there, each once, in order."""
        return list({entry.key: entry for entry in entries if not self.has(entry)}.values())

    def fill(
        self, entries: Sequence[Entry], make: Callable[[Entry], Mapping[str, torch.Tensor]], ranks: GroupCoordinator
    ) -> None:
        """Make what is missing. Each rank makes a share, and then what is still missing on its own disk. Collective;
        raises InputError on all ranks if one entry cannot be made."""
        wanted = ranks.broadcast_object(sorted(one.key for one in self.missing(entries)))
        known = {entry.key: entry for entry in entries}
        self._make([known[key] for key in wanted[ranks.rank_in_group :: ranks.world_size]], make, ranks)
        self._make(self.missing([known[key] for key in wanted]), make, ranks)

    def _make(self, entries: list[Entry], make: Any, ranks: GroupCoordinator) -> None:
        problem = None
        for entry in _shown(entries, ranks.rank_in_group == 0):
            try:
                self.write(entry, make(entry))
            except Exception as error:
                problem = str(error) if isinstance(error, InputError) else _told(entry, error)
                break
        found = next((one for one in ranks.gather_objects(problem) if one), None)
        if found:
            raise InputError(found)


def _shown(entries: list[Entry], leads: bool) -> Iterator[Entry]:
    """Yield entries. The first rank shows how many are made: by a bar on a terminal, elsewhere by a line now and
    then."""
    if not (leads and entries and switch(PROGRESS, os.environ, default=True)):
        yield from entries
        return
    from tqdm import tqdm

    kind, count = entries[0].kind, len(entries)
    bar = tqdm(entries, desc=f"encode {kind}", disable=None)
    for number, entry in enumerate(bar, 1):
        yield entry
        if bar.disable and count >= _LINES and number % (count // _LINES) == 0:
            print(f"{kind}: {number} of {count} encoded", file=sys.stderr, flush=True)


def _told(entry: Entry, error: Exception) -> str:
    return f"{entry.kind} of {entry.name} cannot be made ({type(error).__name__}: {first_line(error)})"


def digest_of_files(folder: Path) -> str:
    """Return a digest of the contents of a component's folder. Files of a hub's cache are named by theirs."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = path.resolve().name
            known = len(blob) == 64 and all(letter in "0123456789abcdef" for letter in blob)
            total.update(f"{path.relative_to(folder)}\0{blob if known else file_digest(path)}\0".encode())
    return total.hexdigest()[:32]
