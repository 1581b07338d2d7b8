"""What ranks do in tests of training: steps over stages, compared with one plain rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from shardit import training
from tests.training.models import Task, accumulate, rounded, task, worst

CLOSE = 2e-6
"""Largest relative difference of a gradient that is right, but for the effects of rounding."""


def join(rank: int, size: int, method: str) -> None:
    """Start the process group of a test."""
    warnings.filterwarnings("ignore")
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size)


def gradients(rank: int, size: int, method: str, name: str, count: int = 4, **options: Any) -> dict[str, Any]:
    """Return how the gradients of one step differ from those of one rank."""
    join(rank, size, method)
    return one_step(task(name), count, {"pipeline_parallel_size": size, **options})


def one_step(
    chosen: Task, count: int, options: dict[str, Any], change: Callable[[nn.Module], object] = lambda _: None
) -> dict[str, Any]:
    """Compare one step with one rank. change: of the model that is trained over stages."""
    plain, model = chosen.build(), chosen.build()
    change(model)
    expected = accumulate(plain, chosen.loss, [chosen.batch(number, False) for number in range(count)])
    batches = [chosen.batch(number, False) for number in range(count)]
    staged = training.stages(model, chosen.loss, plan=chosen.plan, timeout_s=30, **options)
    value = staged.step(batches)
    largest, compared, only = worst(staged.named_parameters(), plain, staged.slices)
    beyond = largest
    if largest > CLOSE and staged.slices.ranks is not None:  # sums over slices round differently in the forward, too
        others = [rounded(chosen, count, seed) for seed in range(3)]
        beyond = worst(staged.named_parameters(), plain, staged.slices, others)[0]
    held = sum(not parameter.is_meta for parameter in model.parameters())
    return {
        "worst": largest,
        "beyond": beyond,
        "compared": compared,
        "only": only,
        "loss": abs(float(value) - expected) / abs(expected),
        "held": held,
        "of": sum(1 for _ in plain.parameters()),
        "share": _count(model) / _count(plain),
    }


def _count(model: Any) -> int:
    return sum(one.numel() for one in model.parameters() if not one.is_meta)


def cases_right(rank: int, size: int, method: str, names: list[str], count: int = 3, **options: Any) -> dict[str, Any]:
    """Compare one step of each case with one rank."""
    from tests.training.cases import cases

    join(rank, size, method)
    known = cases()
    return {name: one_step(known[name], count, {"pipeline_parallel_size": size, **options}) for name in names}
