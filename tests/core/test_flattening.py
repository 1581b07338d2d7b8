"""The arguments of a call are flattened once, whatever looks at them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import register_pytree_node

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import init_mesh
from shardit.core.placement.assignment import Cut
from shardit.core.placement.partition import place_blocks
from shardit.core.stages.entry import entry_of
from shardit.core.stages.runtime import Runtime
from shardit.core.stages.transformer_stages import stage
from tests.support.ranks import run_ranks

flattened: Counter[str] = Counter()


class Counted:
    """A container of one tensor that counts how often it is flattened."""

    def __init__(self, x: torch.Tensor):
        self.x = x


def _flatten(one: Counted) -> tuple[list[Any], None]:
    flattened["counted"] += 1
    return [one.x], None


register_pytree_node(Counted, _flatten, lambda leaves, _: Counted(*leaves))


class Model(nn.Module):
    """Takes its input in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, given: Counted) -> torch.Tensor:
        x = given.x
        for block in self.blocks:
            x = block(x)
        return x


def per_call(rank: int, count: int, method: str, grad: bool) -> list[int]:
    """Return the flattenings of each of three calls."""
    config, found = DiffusionParallelConfig(pipeline_parallel_size=count), []
    runtime = Runtime.of(init_mesh(config, device="cpu", timeout_s=30, rank=rank, init_method=method), 1, False)
    model = Model().requires_grad_(False)
    stage(model, runtime, Cut((), place_blocks([1.0] * 4, count, 1)))
    entry_of(model).compare_inputs(runtime, dict, lambda: None)
    for _ in range(3):
        given = Counted(torch.rand(2, 8))
        flattened.clear()
        with torch.set_grad_enabled(grad):
            float(model(given).sum())
        found.append(flattened["counted"])
    return found


@pytest.mark.parametrize("grad", [False, True])
def test_later_calls_flatten_once(grad: bool) -> None:
    for _, *later in run_ranks(2, per_call, grad):
        assert later == [1, 1]
