"""How much a stage holds: activations of few micro-batches, no gradients of frozen weights, no blocks of others."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from shardit import training
from shardit.core.modules.blocks import find_blocks
from tests.support.ranks import run_ranks
from tests.training.cases import cases, odd
from tests.training.runs import join


class Alive:
    """Counts the activations of one kind that are alive, each time that there is a new one."""

    def __init__(self, module: torch.nn.Module):
        self.found: list[StorageWeakRef] = []
        self.most = 0
        module.register_forward_hook(self._note)

    def _note(self, module: Any, given: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            self.found.append(StorageWeakRef(out.untyped_storage()))
        self.most = max(self.most, self.now())

    def now(self) -> int:
        self.found = [one for one in self.found if not one.expired()]
        return len(self.found)


def alive(rank: int, size: int, method: str, schedule: str, count: int) -> tuple[int, int]:
    """The most micro-batches whose activations are alive at once on this stage, and how many are after the step."""
    join(rank, size, method)
    chosen = odd("plain")
    model = chosen.build()
    staged = training.stages(model, chosen.loss, schedule=schedule, pipeline_parallel_size=size, timeout_s=30)
    batches = [chosen.batch(number, False) for number in range(count)]
    staged.step(batches)  # the first one is watched, too
    own = {name.rpartition(".")[0] for name, _ in staged.named_parameters()}
    found = [Alive(block.norm) for name, block in find_blocks(model) if f"{name}.norm" in own]  # pyright: ignore
    staged.step(batches)
    assert found
    return max(one.most for one in found), sum(one.now() for one in found)


@pytest.mark.parametrize("size", [2, 4])
def test_one_forward_one_backward_holds_few_micro_batches(size: int) -> None:
    held = run_ranks(size, functools.partial(alive, schedule="1f1b", count=8), timeout=90)
    assert held == [(size - stage, 0) for stage in range(size)]


def test_fewer_micro_batches_than_stages() -> None:
    held = run_ranks(4, functools.partial(alive, schedule="1f1b", count=3), timeout=90)
    assert held == [(3, 0), (3, 0), (2, 0), (1, 0)]


def test_all_forwards_first_holds_all_micro_batches() -> None:
    """The negative control of the count."""
    assert run_ranks(2, functools.partial(alive, schedule="gpipe", count=5), timeout=90) == [(5, 0), (5, 0)]


def frozen(rank: int, size: int, method: str, name: str) -> dict[str, Any]:
    """What a step leaves on this stage of a model whose weights are frozen, but for an adapter."""
    join(rank, size, method)
    chosen = cases()[name]
    model = chosen.build()
    staged = training.stages(model, chosen.loss, pipeline_parallel_size=size, timeout_s=30)
    staged.step([chosen.batch(number, False) for number in range(3)])
    parameters = dict(model.named_parameters())
    (schedules,) = staged.cut_loss.known.schedules.values()
    return {
        "frozen with a gradient": sum(p.grad is not None for p in parameters.values() if not p.requires_grad),
        "blocks of others": sum(not p.is_meta for n, p in parameters.items() if _foreign(n, staged)),
        "gradients that cross": sum(item.differentiable for item in schedules.plan.cuts[0]),
        "tensors that cross": len(schedules.plan.cuts[0]),
    }


def _foreign(name: str, staged: training.Stages) -> bool:
    return name not in dict(staged.named_parameters())


@pytest.mark.parametrize(("name", "crossing"), [("lora", 1), ("lora in the last block", 0)])
def test_frozen_weights_get_no_gradients_and_what_needs_none_sends_none_back(name: str, crossing: int) -> None:
    for found in run_ranks(2, frozen, name, timeout=90):
        assert found == {
            "frozen with a gradient": 0,
            "blocks of others": 0,
            "gradients that cross": crossing,
            "tensors that cross": 1,
        }
