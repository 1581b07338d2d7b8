"""Latents and prompt embeddings on disk: made once, by all ranks together, one file for each entry."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardit.core.comm.group import GroupCoordinator
from shardit.errors import InputError, RankError, first_line
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


@dataclass(frozen=True)
class Team:
    """Ranks that make each entry together, of which the first one writes it. number: of this team, of `count`."""

    group: GroupCoordinator
    number: int
    count: int


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
        self,
        entries: Sequence[Entry],
        make: Callable[[Entry], Mapping[str, torch.Tensor]],
        ranks: GroupCoordinator,
        team: Team | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """Make what is missing on any rank. Each team makes a share, and then what is still missing on its own disks.

        team: of this rank; without one each rank makes entries alone. begin: loads what makes entries; called if any is
        missing. Collective; raises InputError on all ranks if one entry cannot be made.
        """
        of_ranks = ranks.gather_objects([one.key for one in self.missing(entries)])
        wanted, known = sorted(set().union(*of_ranks)), {one.key: one for one in entries}
        if not wanted:
            return
        begin()
        number, count = (ranks.rank_in_group, ranks.world_size) if team is None else (team.number, team.count)
        leads = team is None or team.group.is_first_rank
        mine = [known[key] for key in wanted[number::count]]
        self._make(mine, make, ranks, team, {one.key for one in mine if leads})
        left = {one.key for one in self.missing([known[key] for key in wanted])}
        together = left if team is None else set().union(*team.group.gather_objects(left))
        self._make([known[key] for key in sorted(together)], make, ranks, team, left)

    def _make(
        self, entries: list[Entry], make: Any, ranks: GroupCoordinator, team: Team | None, own: Collection[str]
    ) -> None:
        """Make entries; write those that are `own`, by their keys."""
        problem = None
        for entry in _shown(entries, ranks.rank_in_group == 0):
            problem = self._one(entry, make, entry.key in own)
            if team is not None:
                problem = _first(team.group.gather_objects(problem))
            if problem is not None:
                break
        if found := _first(ranks.gather_objects(problem)):
            raise InputError(found)

    def _one(self, entry: Entry, make: Any, writes: bool) -> str | None:
        """Make one entry; return what is wrong."""
        try:
            made = make(entry)
            if writes:
                self.write(entry, made)
        except RankError:
            raise
        except Exception as error:
            return str(error) if isinstance(error, InputError) else _error_text(entry, error)
        return None


def _first(problems: Sequence[str | None]) -> str | None:
    return next((one for one in problems if one), None)


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


def _error_text(entry: Entry, error: Exception) -> str:
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
