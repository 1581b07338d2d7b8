"""Held-out loss and samples during a run: looking changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from shardit.core.comm.mesh import Mesh
from shardit.core.runtime.randomness import generators_kept, seed_all
from shardit.training.recipe import MicroBatch, Recipe


@contextmanager
def looking(models: Mapping[str, nn.Module], mesh: Mesh, seed: int) -> Iterator[None]:
    """Set the models to evaluation, without gradients, with generators of their own; afterwards all is as before."""
    modules = [module for model in models.values() for module in model.modules()]
    modes = [module.training for module in modules]
    try:
        with torch.no_grad(), generators_kept(mesh.device):
            seed_all(seed)
            for module in modules:
                module.training = False
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def held_out_loss(
    recipe: Recipe, batches: list[MicroBatch], models: Mapping[str, nn.Module], mesh: Mesh, seed: int
) -> float | None:
    """Return the mean loss over held-out micro-batches, which the replicas share out; None if they weigh nothing.
    Collective."""
    replica, replicas = mesh.coords["dp"], mesh.sizes["dp"]
    total = torch.zeros(2, dtype=torch.float64)
    with looking(models, mesh, seed):
        for number in range(replica, len(batches), replicas):
            one = batches[number]
            if one.weight > 0:
                seed_all(seed + number)
                value = float(recipe.loss(models[one.model], one.data))
                total += torch.tensor([value * one.weight, one.weight], dtype=torch.float64)
    if (group := mesh.axes.get("dp")) is not None:
        total = group.all_reduce(total.to(mesh.device)).cpu()
    weight = float(total[1])
    return float(total[0]) / weight if weight and math.isfinite(weight) else None


def samples(recipe: Recipe, models: Mapping[str, nn.Module], mesh: Mesh, seed: int, folder: Path) -> list[Path]:
    """Write samples of the models as they are; return their files. Collective."""
    if recipe.sample is None:
        return []
    with looking(models, mesh, seed):
        return recipe.sample(models, folder)
