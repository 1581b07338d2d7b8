"""What cannot be right over stages is refused, with a name and a way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shardit import UnsupportedError, training
from tests.support.ranks import run_ranks
from tests.training.cases import Odd, odd, wan
from tests.training.models import Task, picture_loss
from tests.training.runs import join


def _teacher_after(model: Any, batch: Any) -> torch.Tensor:
    value = picture_loss(model, batch)
    with torch.no_grad():
        return value + model(**batch).sample.mean()


def _reads_between(model: Any, x: torch.Tensor) -> torch.Tensor:
    h = model.embed(x)
    for block in model.blocks:
        h = block(h)
        h = h if float(h.sum()) > 0 else -h
    return h.mean()


def _draws_between(model: Any, x: torch.Tensor) -> torch.Tensor:
    h = model.embed(x)
    for block in model.blocks:
        h = block(h) * torch.rand(())
    return h.mean()


def _through_numpy(model: Any, x: torch.Tensor) -> torch.Tensor:
    h = model.embed(x)
    for number, block in enumerate(model.blocks):
        h = block(h)
        if number == 0:
            model.kept = h.detach().numpy().mean()
    return h.mean() + float(model.kept)


def _writes_to_its_batch(model: Any, x: torch.Tensor) -> torch.Tensor:
    x += 1
    return model(x).mean()


def _first_block_again(model: Any, x: torch.Tensor) -> torch.Tensor:
    h = model.embed(x)
    for number in (0, 1, 2, 3, 0):
        h = model.blocks[number](h)
    return h.mean()


def cases() -> dict[str, tuple[Task, str]]:
    """What is refused, and a part of the text."""
    plain = odd("plain")
    return {
        "reentrant": (odd("reentrant"), "use_reentrant=False"),
        "numpy": (
            odd("numpy"),
            "so something made of the output of blocks.0 crosses a cut and is neither an argument nor an output of "
            "a block",
        ),
        "attribute": (
            replace(plain, loss=_through_numpy),
            "so something made of the output of blocks.0 crosses a cut and is neither",
        ),
        "teacher after": (replace(wan(), loss=_teacher_after), "without gradients after a call with gradients"),
        "reads between": (replace(plain, loss=_reads_between), "reads a value on the host"),
        "draws between": (replace(plain, loss=_draws_between), "draws random numbers between block calls"),
        "writes": (replace(plain, loss=_writes_to_its_batch), "writes into one of its arguments"),
        "first block again": (replace(plain, loss=_first_block_again), "change schedule or layer_partition"),
    }


def refusals(rank: int, size: int, method: str) -> dict[str, str]:
    join(rank, size, method)
    found = {}
    for name, (chosen, _) in cases().items():
        staged = training.stages(chosen.build(), chosen.loss, pipeline_parallel_size=size, timeout_s=20)
        with pytest.raises(UnsupportedError) as error:
            staged.step([chosen.batch(0, False)])
        found[name] = str(error.value)
    return found


def test_what_cannot_be_right_is_refused() -> None:
    for found in run_ranks(2, refusals, timeout=120):
        for name, (_, part) in cases().items():
            assert part in found[name], (name, found[name])
            assert "\n" not in found[name]


def late_order(rank: int, size: int, method: str, refused: bool, make: Callable[[], Task]) -> str:
    """The parameters are asked for before the first step of a model that needs an example."""
    join(rank, size, method)
    chosen = make()
    options: dict[str, Any] = {} if refused else {"example": chosen.batch(0, False)}
    staged = training.stages(chosen.build(), chosen.loss, pipeline_parallel_size=size, timeout_s=20, **options)
    names = [name for name, _ in staged.named_parameters()]
    try:
        staged.step([chosen.batch(number, False) for number in range(2)])
    except UnsupportedError as error:
        return str(error)
    assert names == [name for name, _ in staged.named_parameters()]
    return "done"


def _other_order() -> Task:
    def loss(model: Any, x: torch.Tensor) -> torch.Tensor:
        h = model.embed(x)
        for number in (2, 3, 0, 1):
            h = model.blocks[number](h)
        return h.mean()

    return replace(odd("plain"), loss=loss)


def _parameter_outside() -> Task:
    return odd("parameter outside")


@pytest.mark.parametrize("make", [_other_order, _parameter_outside])
def test_parameters_before_the_first_step_need_an_example_where_it_matters(make: Callable[[], Task]) -> None:
    assert all("example=" in text for text in run_ranks(2, late_order, True, make, timeout=60))
    assert run_ranks(2, late_order, False, make, timeout=60) == ["done", "done"]


def items(rank: int, size: int, method: str) -> bool:
    """A loss that logs its own value: only the last stage has it, and no stage needs it after that."""
    join(rank, size, method)
    chosen, logged = odd("plain"), []

    def loss(model: Odd, x: torch.Tensor) -> torch.Tensor:
        value = (model(x) ** 2).mean()
        logged.append(value.item())
        return value

    staged = training.stages(chosen.build(), loss, pipeline_parallel_size=size, timeout_s=20)
    value = float(staged.step([chosen.batch(0, False)]))
    return value in [pytest.approx(one, rel=1e-6) for one in logged]


def test_a_loss_may_read_its_value() -> None:
    assert all(run_ranks(2, items, timeout=60))
