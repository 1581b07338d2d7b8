"""Resolves a model name to a pipeline folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shardit.errors import InputError
from shardit.loading.hub import HubRemote, open_hub, weight_files
from shardit.loading.index import INDEX, read_index
from shardit.models import tiny
from shardit.settings.paths import is_hub_id, user_path


@dataclass(frozen=True)
class ModelSource:
    """A model folder. name: written by diffusers to _name_or_path. remote: the hub commit of the folder."""

    folder: Path
    name: str
    remote: HubRemote | None = None


def locate(model: str | os.PathLike, weights: bool = True, variant: str | None = None) -> ModelSource:
    """Return the folder of "tiny/NAME", of a local diffusers folder, or of a hub id, whose required files are
    downloaded; without `weights` all but its weight files.

    Raises InputError if there is no such model, with the remedy in one line.
    """
    text = os.fspath(model)
    if (folder := tiny.resolve(text)) is not None:
        return ModelSource(folder, str(folder))
    path = local_folder(model)
    if path is not None:
        return ModelSource(path, str(path))
    remote = open_hub(text, variant)
    if weights:
        remote.fetch(weight_files(remote))
    return ModelSource(remote.folder, text, remote)


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
