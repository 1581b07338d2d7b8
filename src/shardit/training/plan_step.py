"""The micro-batches of one step: their shares of the mean over all replicas, and their seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardit.core.comm.mesh import Mesh
from shardit.core.runtime.digests import digests
from shardit.core.training.micro_batch import tree_of
from shardit.errors import InputError

_SEEDS = 2**62
_STRIDE = 0x9E3779B97F4A7C15
"""Distance of the seeds of neighbouring micro-batches: an odd number, so that no two are the same."""


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of this replica, without those of weight 0; factors: their shares of the mean over all
    replicas; seeds: of their random numbers, the same for any numbers of ranks. first: the first micro-batch that was
    given, of whatever weight."""

    batches: list[Any]
    factors: list[float]
    seeds: list[int]
    first: Any


def plan_step(micro_batches: Sequence[Any], weights: Any, mesh: Mesh, state: Any, example: Any = None) -> StepPlan:
    """Compare what the ranks of a replica were given and their `state`, and count over the replicas. example: a
    micro-batch like those of other replicas, for one that has none. Collective; raises InputError on all ranks."""
    problem, batches, numbers = _checked(micro_batches, weights, example)
    base = int(torch.randint(_SEEDS, ()))
    mine = {"problem": problem, "base": base, "batches": _digests(batches, numbers), "state": state}
    of_ranks = mesh.replica.gather_objects(mine)
    base = of_ranks[0]["base"]
    problem = next((one["problem"] for one in of_ranks if one["problem"]), None)
    if problem is None and any(one["batches"] != mine["batches"] for one in of_ranks):
        problem = "ranks were given different micro-batches: give all ranks of a replica the same"
    if problem is None and any(one["state"] != state for one in of_ranks):
        problem = "ranks differ in train() or eval(), requires_grad or autocast: set them alike on all ranks"
    replicas = mesh.axes.get("dp")
    summary = (problem, base, len(batches), math.fsum(numbers))
    everyone = replicas.gather_objects(summary) if replicas is not None else [summary]
    problem = next((one[0] for one in everyone if one[0]), None)
    if problem:
        raise InputError(problem)
    total = math.fsum(one[3] for one in everyone)
    start = sum(one[2] for one in everyone[: mesh.coords["dp"]])
    base = everyone[0][1]
    kept = [number for number, weight in enumerate(numbers) if weight > 0]
    return StepPlan(
        [batches[number] for number in kept],
        [numbers[number] / total for number in kept],
        [(base + (start + number) * _STRIDE) % 2**63 for number in kept],
        batches[0] if batches else example,
    )


def _checked(micro_batches: Any, weights: Any, example: Any) -> tuple[str | None, list[Any], list[float]]:
    """Return what is wrong, the micro-batches and their weights."""
    if not isinstance(micro_batches, (list, tuple)):
        return f"micro_batches must be a list, got {type(micro_batches).__name__}", [], []
    batches = list(micro_batches)
    if not batches and example is None:
        return "micro_batches is empty: give every rank at least one", [], []
    if weights is None:
        return None, batches, [1.0] * len(batches)
    numbers = [float(weight) for weight in weights]
    if len(numbers) != len(batches):
        return f"weights has {len(numbers)} entries for {len(batches)} micro-batches: give one for each", [], []
    wrong = next((weight for weight in numbers if not (math.isfinite(weight) and weight >= 0)), None)
    if wrong is not None:
        return f"weights has {wrong}: each must be a finite number, 0 or more", [], []
    return None, batches, numbers


def _digests(batches: list[Any], weights: list[float]) -> Any:
    return digests({str(number): tree_of(batch) for number, batch in enumerate(batches)}), weights
