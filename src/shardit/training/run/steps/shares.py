"""The micro-batches of one step: those of this replica, and what all replicas together have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.mesh import Mesh
from shardit.errors import InputError, RankError, first_line
from shardit.training.recipe import MicroBatch, TrainingRecipe

LOOK_AT = 64
"""Steps in which an example of each model is looked for before the first one."""


@dataclass(frozen=True)
class Shares:
    """mine: the micro-batches of this replica by model. weights: of all replicas by model. items: the names of all
    data, with their models, in the order of the stream. stop: a rank was asked to stop."""

    mine: dict[str, list[MicroBatch]]
    weights: dict[str, float]
    items: list[tuple[str, str]]
    samples: int
    stop: bool

    @property
    def weight(self) -> float:
        """The weight of all micro-batches."""
        return math.fsum(self.weights.values())


def draw(recipe: TrainingRecipe, step: int, mesh: Mesh, world: GroupCoordinator, stop: bool) -> Shares:
    """Draw the micro-batches of a step. Collective; if one rank cannot read its data, all raise the same error."""
    batches, problem, cause = _read(recipe, step, mesh)
    mine = {
        "problem": problem,
        "refused": isinstance(cause, InputError),
        "stop": stop,
        "of": [(one.model, one.weight, one.items) for one in batches] if mesh.replica.is_first_rank else [],
    }
    everyone = world.gather_objects(mine)
    for rank, one in enumerate(everyone):
        if one["problem"]:
            text = f"step {step + 1}: {one['problem']}"
            raise (InputError(text) if one["refused"] else RankError(rank, text)) from cause
    every = [entry for one in everyone for entry in one["of"]]
    grouped: dict[str, list[MicroBatch]] = {}
    for one in batches:
        grouped.setdefault(one.model, []).append(one)
    return Shares(
        grouped,
        {model: math.fsum(weight for name, weight, _ in every if name == model) for model in recipe.models},
        [(model, item) for model, _, items in every for item in items],
        sum(len(items) for _, weight, items in every if weight > 0),
        any(one["stop"] for one in everyone),
    )


def _read(recipe: TrainingRecipe, step: int, mesh: Mesh) -> tuple[Sequence[MicroBatch], str | None, Exception | None]:
    """Return the micro-batches of this rank, or the error of reading them in words and itself."""
    try:
        batches = recipe.micro_batches(step, mesh.coords["dp"], mesh.sizes["dp"])
        wrong = next((one.model for one in batches if one.model not in recipe.models), None)
        if wrong is not None:
            raise RuntimeError(f"a micro-batch is for {wrong}, which is not trained")
    except InputError as error:
        return [], str(error), error
    except Exception as error:
        return [], f"{type(error).__name__}: {first_line(error)}", error
    return batches, None, None


def examples(recipe: TrainingRecipe, replicas: int, steps: int) -> dict[str, Any]:
    """Return the data of a micro-batch for each model, the same on every rank; without those that come late."""
    found: dict[str, Any] = {}
    for step in range(min(steps, LOOK_AT)):
        for replica in range(replicas):
            for one in recipe.micro_batches(step, replica, replicas):
                if one.weight > 0:
                    found.setdefault(one.model, one.data)
            if len(found) == len(recipe.models):
                return found
    return found


def example_of(recipe: TrainingRecipe, model: str, step: int, replicas: int) -> Any:
    """Return the data of the first micro-batch of a step for a model, of whatever replica."""
    batches = (one for replica in range(replicas) for one in recipe.micro_batches(step, replica, replicas))
    return next(one.data for one in batches if one.model == model and one.weight > 0)
