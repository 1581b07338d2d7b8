"""Configurations of real models that come with shardit, without weights: for `shardit inspect`.

Each folder in `configs/` is laid out like a diffusers repository: model_index.json and a config.json for each model.
"""

from __future__ import annotations

import os
from pathlib import Path

from shardit.errors import InputError, did_you_mean
from shardit.loading.index import INDEX
from shardit.loading.weight_names import is_weights
from shardit.settings.paths import is_hub_id, user_path

FOLDER = Path(__file__).parent / "configs"

HUB_IDS = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "Wan2.2-T2V-A14B",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "Wan2.2-I2V-A14B",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "Wan2.2-TI2V-5B",
    "Qwen/Qwen-Image": "Qwen-Image",
    "black-forest-labs/FLUX.1-dev": "FLUX.1-dev",
    "stabilityai/stable-diffusion-3.5-large": "SD3.5-large",
}
"""Hub ids of the weights for each configuration."""


def names() -> list[str]:
    """Return the names of all configurations."""
    return sorted(HUB_IDS.values())


def shipped(model: str) -> Path | None:
    """Return the folder of the configuration of that name or hub id, or None."""
    name = HUB_IDS.get(model, model)
    return FOLDER / name if name in HUB_IDS.values() else None


def configurations(model: str | os.PathLike[str], variant: str | None = None) -> Path | None:
    """Return a folder with configurations alone: the user's own, or one that comes with shardit if the model itself is
    not on this disk; None if there are weights.

    Raises InputError for a name that is neither a model nor one of those configurations, and if a variant is given
    without weights.
    """
    found = _configurations(model)
    if variant is not None and found is not None:
        raise InputError(f"variant: there are no weight files of {model} here; leave variant out")
    return found


def _configurations(model: str | os.PathLike[str]) -> Path | None:
    from shardit.loading.hub import LOCAL, cached
    from shardit.loading.source import local_folder

    name = os.fspath(model)
    path, folder = user_path("model", name), shipped(name)
    if path.is_dir():
        has_weights = any(is_weights(file.name) for file in path.rglob("*"))
        return None if has_weights or not (path / INDEX).exists() else path
    if path.exists() or name.startswith("tiny/") or (is_hub_id(name) and cached(name)):
        return None
    if "/" in name:
        local_folder(model)  # raises for a path that does not exist
    if folder is None and "/" not in name:
        near, others = did_you_mean(name, names()), ", ".join(names())
        raise InputError(f"there is no model {name!r}{near}; give a hub id, {LOCAL}, or one of {others}")
    return folder
