"""The parts of tiny/shapes, before they are trained; sizes of its clips."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shardit.models.tiny.recipes.shapes import RECIPE
from shardit.models.tiny.writer import write_folder
from shardit.training.data import shapes

SIZE, FRAMES = RECIPE.call["height"], RECIPE.call["num_frames"]


def pixels(drawing: shapes.Drawing, frames: int = FRAMES) -> torch.Tensor:
    """Return a drawn clip as (3, frames, height, width) in [-1, 1]."""
    return torch.from_numpy(drawing.frames(SIZE, SIZE, frames)).permute(3, 0, 1, 2) / 127.5 - 1


def built(component: str, **changes: Any) -> Any:
    """Return a component as its library makes it, with changes of its configuration."""
    import diffusers
    import transformers

    part = RECIPE.parts[component]
    assert part is not None
    torch.manual_seed(1)
    if part.library == "diffusers":
        return getattr(diffusers, part.cls)(**{**part.config, **changes})
    cls = getattr(transformers, part.cls)
    return cls(cls.config_class(**part.config))


def write(weights: Path, folder: Path) -> None:
    """Write the folder of a pipeline whose tensors, named COMPONENT.NAME, are in one file."""
    write_folder("shapes", dataclasses.replace(RECIPE, weights=weights), folder, torch.float32)


def join(states: dict[str, dict[str, torch.Tensor]], file: Path, dtype: torch.dtype) -> None:
    """Write the tensors of components into one file."""
    tensors = {
        f"{component}.{name}": tensor.to(dtype).contiguous().clone()
        for component, state in states.items()
        for name, tensor in state.items()
    }
    save_file(tensors, str(file))
