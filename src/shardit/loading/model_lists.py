"""Loads models that are lists of models, such as several ControlNets, each saved in its own folder: NAME, NAME_1,
NAME_2 and so on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.errors import InputError
from shardit.loading.checkpoint import Checkpoint, Remote
from shardit.loading.safetensors_file import Header, Reads, TensorEntry

if TYPE_CHECKING:
    from torch import nn


def is_several(cls: Any) -> bool:
    """Return whether a diffusers model class is a list of other models: it has no configuration of its own."""
    return not hasattr(cls, "load_config")


def folders_of(folder: str | os.PathLike) -> list[Path]:
    """Return the folders of the models in such a list; the first is `folder`."""
    found = [Path(folder)]
    while (following := Path(f"{os.fspath(folder)}_{len(found)}")).is_dir():
        found.append(following)
    return found


def class_in(folder: Path) -> Any:
    """Return the diffusers class in the config.json of a folder. Raises InputError."""
    import diffusers

    path = folder / "config.json"
    try:
        name = json.loads(path.read_text())["_class_name"]
        return getattr(diffusers, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} names no class of diffusers: download or copy the model again") from error


def list_name(module: nn.Module) -> str:
    """Return the name of the module list that contains the other models."""
    from torch import nn

    return next(name for name, child in module.named_children() if isinstance(child, nn.ModuleList))


@dataclass
class SeveralWeights(Checkpoint):
    """The weights of all models in the list, under their names in the whole module: NETS.1.NAME for the second. File
    names are relative to the folder of the model: NAME_1/FILE."""

    parts: Mapping[str, Checkpoint] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, folder: Path, remote: Remote | None, variant: str | None) -> SeveralWeights:
        """Find the weights of a module in `folder` and in the numbered folders next to it; errors as in
        `Checkpoint.open`."""
        name, folders = list_name(module), folders_of(folder)
        parts = {f"{name}.{index}.": Checkpoint.open(one, remote, variant) for index, one in enumerate(folders)}
        files = {
            f"{prefix}{key}": f"{part.folder.name}/{file}"
            for prefix, part in parts.items()
            for key, file in part.files.items()
        }
        found = next((part.variant for part in parts.values() if part.variant), None)
        return cls(folder.parent, files, any(part.sharded for part in parts.values()), remote, found, parts=parts)

    def variants(self) -> list[str]:
        """Return the weight variants in any of the folders."""
        return sorted({one for part in self.parts.values() for one in part.variants()})

    def header(self, file: str) -> Header:
        """Return the header of one of the files."""
        part, name = self._part(file)
        return part.header(name)

    def entry(self, key: str) -> TensorEntry:
        """Return the location of tensor `key` in its file."""
        prefix, part = next((prefix, part) for prefix, part in self.parts.items() if key.startswith(prefix))
        return part.entry(key.removeprefix(prefix))

    def ensure(self, files: set[str], reads: Reads | None = None) -> None:
        """Ensure that these files are on this disk."""
        for file in sorted(files):
            part, name = self._part(file)
            part.ensure({name}, reads)

    def _part(self, file: str) -> tuple[Checkpoint, str]:
        folder, _, name = file.partition("/")
        return next(part for part in self.parts.values() if part.folder.name == folder), name
