"""Built-in tiny checkpoints: real component classes, a few megabytes, a second per run, no download.

>>> folder = tiny.write("qwen-image", "qwen-folder")
>>> pipe = tiny.load_plain(folder)
>>> image = pipe(prompt="a red fox", **tiny.defaults("qwen-image")).images[0]
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.errors import InputError
from shardit.settings.paths import check_name

if TYPE_CHECKING:
    import torch

__all__ = ["defaults", "example_prompt", "filled_in", "images", "load_plain", "names", "resolve", "write"]

# What a tiny model is not asked for, it does at its own small size: its class' defaults are meant for real ones.
_OWN_SIZE = (
    "width",
    "height",
    "num_frames",
    "num_inference_steps",
    "max_sequence_length",
    "layers",
    "resolution",
    "enable_prompt_rewrite",
)


def names() -> tuple[str, ...]:
    """Return the names of all tiny checkpoints, sorted."""
    from shardit.models.tiny.recipes.catalog import RECIPES

    return tuple(sorted(RECIPES))


def write(name: str, folder: str | Path, *, dtype: str | torch.dtype = "float32") -> Path:
    """Writes the checkpoint as a diffusers folder (a folder of transformers for a language model) and returns its path;
    the same tensors on every machine."""
    from shardit.models.tiny import language
    from shardit.models.tiny.plain import as_dtype
    from shardit.models.tiny.recipes.catalog import recipe
    from shardit.models.tiny.writer import write_folder

    folder = Path(folder).absolute()
    chosen = None if name in language.CONFIGURATIONS else recipe(name)
    check_name("folder", folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder")
    try:
        if chosen is None:
            return language.write(name, folder, as_dtype(dtype))
        return write_folder(name, chosen, folder, as_dtype(dtype))
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror or error}); choose another folder") from error


def defaults(name: str) -> dict[str, Any]:
    """Call arguments for a quick run, in diffusers' names; prompt, image and generator are the caller's."""
    from shardit.models.tiny.recipes.catalog import recipe

    return copy.deepcopy(recipe(name).call)


def filled_in(name: str, given: Collection[str]) -> dict[str, Any]:
    """Return the defaults of a tiny model for names that are not in `given`. Given noise levels and time steps
    determine the number of steps. A trained model has its own guidance scale."""
    from shardit.models.tiny.recipes.catalog import recipe

    call, trained = defaults(name), recipe(name).weights is not None
    given_names = {*given, *(["num_inference_steps"] if {"sigmas", "timesteps"} & {*given} else [])}
    own = (*_OWN_SIZE, *(["guidance_scale"] if trained else []))
    return {argument: call[argument] for argument in own if argument in call and argument not in given_names}


def example_prompt(name: str) -> str:
    """Return a prompt that the model understands; "" if its weights are made up."""
    from shardit.models.tiny.recipes.catalog import recipe

    return recipe(name).prompt


def images(name: str) -> int:
    """Return the number of input images that the pipeline needs."""
    from shardit.models.tiny.recipes.catalog import recipe

    return recipe(name).images


def resolve(model: str) -> Path | None:
    """Return the cached folder for "tiny/NAME", written on first use; None for any other string."""
    from shardit.models.tiny.cache import PREFIX, cached_folder
    from shardit.models.tiny.recipes.catalog import recipe

    if not model.startswith(PREFIX):
        return None
    name = model[len(PREFIX) :]
    recipe(name)
    return cached_folder(name)


def load_plain(
    folder: str | Path, *, dtype: str | torch.dtype | None = None, pipeline_class: str | None = None, **kw: Any
) -> Any:
    """Return a plain diffusers pipeline on the CPU: the reference. `dtype` None: float32."""
    from shardit.models.tiny.plain import load_plain as load

    return load(folder, dtype=dtype, pipeline_class=pipeline_class, **kw)
