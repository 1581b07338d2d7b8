"""Held-out loss and samples during a run: looking changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardit.core.comm.mesh import Mesh
from shardit.core.runtime.randomness import seed_all
from shardit.errors import InputError, first_line
from shardit.training.evaluation import evaluation_mode
from shardit.training.recipe import MicroBatch, TrainingRecipe


def held_out_loss(
    recipe: TrainingRecipe, batches: list[MicroBatch], models: Mapping[str, nn.Module], mesh: Mesh, seed: int
) -> float | None:
    """Return the mean loss over held-out micro-batches, which the replicas share out; None if that is no number.
    Collective."""
    replica, replicas = mesh.coords["dp"], mesh.sizes["dp"]
    total = torch.zeros(2, dtype=torch.float64)
    with evaluation_mode(models, mesh.device):
        for number in range(replica, len(batches), replicas):
            one = batches[number]
            if one.weight > 0:
                seed_all(seed + number)
                value = float(recipe.loss(models[one.model], one.data))
                total += torch.tensor([value * one.weight, one.weight], dtype=torch.float64)
    if (group := mesh.axes.get("dp")) is not None:
        total = group.all_reduce(total.to(mesh.device)).cpu()
    mean = float(total[0] / total[1])
    return mean if math.isfinite(mean) else None


def samples(
    recipe: TrainingRecipe,
    models: Mapping[str, nn.Module],
    mesh: Mesh,
    seed: int,
    folder: Path,
    gather: Callable[[Any], list[Any]],
) -> tuple[list[Path], str | None]:
    """Write samples of the models as they are; return their files, and why they could not be written. Collective;
    gather: over all ranks."""
    files, problem = [], None
    if recipe.sample is not None:
        with evaluation_mode(models, mesh.device):
            seed_all(seed)
            try:
                files = recipe.sample(models, folder)
            except (OSError, InputError) as error:  # a full disk ends no run
                problem = first_line(error)
    return files, next((one for one in gather(problem) if one), None)
