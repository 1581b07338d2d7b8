"""Resolves a model name to a pipeline folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shardit.errors import InputError
from shardit.loading.hub import HubRemote, open_hub, weight_files
from shardit.loading.index import INDEX, read_index
from shardit.settings.paths import is_hub_id, user_path


@dataclass(frozen=True)
class Source:
    """A model folder. name: written by diffusers to _name_or_path. remote: the hub commit of the folder."""

    folder: Path
    name: str
    remote: HubRemote | None = None


def resolve(model: str | os.PathLike, weights: bool = True) -> Path:
    """Return the folder of "tiny/NAME", of a local diffusers folder, or of a hub id, whose required files are
    downloaded.

    With `weights=False` the weight files of a hub id are left out (see `fetch_weights`).
    Raises InputError if there is no such model, with the remedy in one line.
    """
    return locate(model, weights).folder


def fetch_weights(model: str | os.PathLike, folder: str | os.PathLike, files: Iterable[str]) -> None:
    """Download named weight files ("transformer/model-00001-of-00002.safetensors") into the folder of `resolve`.

    Skips files that are already there. Raises InputError if a file is missing and cannot be downloaded.
    """
    folder, wanted = Path(folder), list(files)
    absent = [file for file in wanted if not (folder / file).exists()]
    if not absent:
        return
    if Path(model).is_dir() or not is_hub_id(str(model)):
        raise InputError(f"{folder / absent[0]} is missing: download or copy the model again")
    HubRemote(str(model), folder).fetch(absent)


def locate(model: str | os.PathLike, weights: bool = True, variant: str | None = None) -> Source:
    """Resolve a model as `resolve` does, and return the source of its files as well."""
    text = os.fspath(model)
    if text.startswith("tiny/"):
        folder = _tiny(text)
        return Source(folder, str(folder))
    path = local_folder(model)
    if path is not None:
        return Source(path, str(path))
    remote = open_hub(text, variant)
    if weights:
        remote.fetch(weight_files(remote))
    return Source(remote.folder, text, remote)


def local_folder(model: str | os.PathLike) -> Path | None:
    """Return the model's folder on this disk; None for a hub id and for a tiny model. Imports neither torch nor
    diffusers.

    Raises InputError if there is no such model.
    """
    text = os.fspath(model)
    if text.startswith("tiny/"):
        from shardit.models.tiny.recipes.catalog import recipe

        recipe(text.removeprefix("tiny/"))
        return None
    if not text:
        raise InputError("no model given: name a folder, a hub id or tiny/NAME")
    path = user_path("model", text)
    if path.is_dir():
        read_index(path)  # raises if the index is damaged
        return path
    if path.exists():
        raise InputError(f"{text} is a single file: give a diffusers folder (one that holds {INDEX})")
    if isinstance(model, Path) or not is_hub_id(text):
        raise InputError(f"there is no folder {text}: check the path")
    return None


def _tiny(name: str) -> Path:
    from shardit.models import tiny

    folder = tiny.resolve(name)
    if folder is None:
        raise InputError(f"there is no tiny model {name!r}: there are {', '.join(sorted(tiny.names()))}")
    return Path(folder)
