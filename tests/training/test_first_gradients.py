"""The first gradients over the stages are compared with those of the whole model, which finds what is wrong in them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shardit import UnsupportedError, training
from shardit.core.training import first_gradients
from shardit.core.training.loss_plan import CutTensor
from tests.support.ranks import run_ranks
from tests.training.cases import cases, odd
from tests.training.models import Task, task
from tests.training.runs import join
from tests.training.test_own_share import keep_share


class Lines(logging.Handler):
    """Collects log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        logger = logging.getLogger("shardit")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


def _wrong_factor() -> None:
    """The gradient that comes back over a cut is 1 % too large."""
    own = CutTensor.unpack
    CutTensor.unpack = lambda self, received: _Scaled.apply(own(self, received), 1.01)  # pyright: ignore


def _no_gradient_back() -> None:
    """No gradient comes back over a cut."""
    own = CutTensor.unpack
    CutTensor.unpack = lambda self, received: own(self, received) * 1.0 + 0.0 * received.detach()  # pyright: ignore
    CutTensor.pack = lambda self, tensor: tensor.detach().contiguous().requires_grad_()  # pyright: ignore


def _nothing() -> None:
    pass


def first_step(
    rank: int, size: int, method: str, make: Callable[[], Task], wrong: Callable[[], None], parted: bool, free: float
) -> dict[str, Any]:
    """Make a step; return log lines, the error if there is one, and the gradients that are left."""
    join(rank, size, method)
    lines, chosen = Lines(), make()
    model = chosen.build()
    if parted:
        keep_share(model, rank, size)
    if free >= 0:
        first_gradients.free_bytes = lambda _: free
    wrong()
    found: dict[str, Any] = {"error": "", "lines": lines.found}
    try:
        staged = training.stages(
            model, chosen.loss, pipeline_parallel_size=size, example=chosen.batch(0, False), timeout_s=30
        )
        found["gradients"] = sum(one.grad is not None for one in staged.parameters())
        staged.step([chosen.batch(0, False)])
    except UnsupportedError as error:
        found["error"] = str(error)
    return found


def on_two(
    make: Callable[[], Task], wrong: Callable[[], None] = _nothing, parted: bool = False, free: float = -1
) -> Any:
    return run_ranks(2, first_step, make, wrong, parted, free, timeout=90)


def _of(name: str) -> Task:
    return cases()[name] if name in cases() else task(name)


NAMES = [
    "llama",
    "dropout",
    "lora",
    "teacher",
    "tied blocks",
    "tied ends",
    "parameter outside",
    "each block twice",
    "in place",
]
BLOCKWISE = ["lora, checkpointing", "dropout, checkpointing", "two calls", "UNet2DConditionModel-adapter"]
"""In the last one a block returns a tensor twice, and code outside writes to it."""
HOW = {"": "those of the whole model: ", "parted": "those of all ranks block by block: ", "free": "block by block: "}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *((name, {}) for name in NAMES),
        *((name, {"parted": True}) for name in (*NAMES, *BLOCKWISE)),
        ("llama", {"free": 1000.0}),
    ],
)
def test_right_gradients_are_told_and_leave_nothing(name: str, given: dict[str, Any]) -> None:
    for found in on_two(functools.partial(_of, name), **given):
        assert not found["error"]
        assert found["gradients"] == 0
        line = next(line for line in found["lines"] if HOW[next(iter(given), "")] in line)
        print(line)
        assert ": 0 parameters" not in line


@pytest.mark.parametrize("name", ["llama", "lora"])
@pytest.mark.parametrize("wrong", [_wrong_factor, _no_gradient_back])
@pytest.mark.parametrize("parted", [False, True])
def test_a_wrong_gradient_is_an_error_that_names_the_parameter(
    name: str, wrong: Callable[[], None], parted: bool
) -> None:
    for found in on_two(functools.partial(_of, name), wrong, parted):
        assert "over the stages the gradient of" in found["error"]
        assert ("layers." if name == "llama" else "blocks.") in found["error"]
        assert "\n" not in found["error"]


def _half() -> Task:
    chosen = task("llama")
    return replace(chosen, build=lambda: chosen.build().to(torch.bfloat16))


def test_half_precision_has_a_wider_bound() -> None:
    assert not any(found["error"] for found in on_two(_half))
    assert all(found["error"] for found in on_two(_half, _no_gradient_back))


def _hooked() -> Task:
    chosen = odd("plain")

    def build() -> Any:
        model: Any = chosen.build()
        model.embed.weight.register_hook(lambda gradient: None)
        return model

    return replace(chosen, build=build)


def test_a_check_that_is_left_out_is_told() -> None:
    for found in on_two(_hooked):
        assert not found["error"]
        assert "the first gradients are not compared: a parameter has a hook" in found["lines"]
