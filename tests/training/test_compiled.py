"""Compiled blocks, with checkpointing and in half precision, over stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shardit import UnsupportedError, training
from tests.support.ranks import run_ranks
from tests.training.models import accumulate, task, worst
from tests.training.runs import join

CLOSE = 2e-6
BACKEND = "aot_eager"
"""A backend that takes the graphs apart as others do, forward and backward, and needs no compiler."""


def in_place(model: Any, blocks: nn.ModuleList) -> None:
    """Compile the calls of blocks, as `compile_repeated_blocks` of diffusers does."""
    for block in blocks:
        block.compile(backend=BACKEND)


def wrapped(model: Any, blocks: nn.ModuleList) -> None:
    """Replace blocks by modules of torch.compile."""
    for number, block in enumerate(blocks):
        blocks[number] = torch.compile(block, backend=BACKEND)  # pyright: ignore


def parts(model: Any, blocks: nn.ModuleList) -> None:
    """Compile a part of each block alone, and the head."""
    for block in blocks:
        block.mlp.compile(backend=BACKEND)
    model.lm_head.compile(backend=BACKEND)


def compiled(schedule: str, how: Callable[..., None], axes: dict[str, int]) -> list[float]:
    """A step with compiled blocks, compared with one rank without; return the largest differences."""
    torch._dynamo.reset()
    chosen = task("llama")
    plain, model = chosen.build(), chosen.build()
    how(model, model.model.layers)  # pyright: ignore
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    staged = training.stages(model, chosen.loss, schedule=schedule, timeout_s=60, **axes)
    batches = [chosen.batch(number, False) for number in range(3)]
    expected = accumulate(plain, chosen.loss, batches)
    value = float(staged.step(batches))
    largest, compared, only = worst(staged.named_parameters(), plain, staged.slices)
    assert compared
    assert not only, only
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    return [abs(value / expected - 1), largest]


STAGED = (("zbv", in_place), ("1f1b", wrapped), ("zbv", parts))


def compiled_whole() -> list[str]:
    """The errors for models that are compiled around their blocks."""
    found = []
    for change in (
        lambda model: torch.compile(model, backend=BACKEND),
        lambda model: model.compile(backend=BACKEND) or model,
        lambda model: model.model.compile(backend=BACKEND) or model,
    ):
        with pytest.raises(UnsupportedError) as error:
            training.stages(change(task("llama").build()), task("llama").loss, pipeline_parallel_size=2)
        found.append(str(error.value))
    return found


Found = tuple[list[list[float]], list[float], list[str]]
"""Differences over stages, those of slices, and errors."""


def on_ranks(rank: int, size: int, method: str) -> Found:
    join(rank, size, method)
    staged = [compiled(schedule, how, {"pipeline_parallel_size": size}) for schedule, how in STAGED]
    return staged, compiled("1f1b", wrapped, {"tensor_parallel_size": size}), compiled_whole()


@pytest.fixture(scope="module")
def by_rank() -> list[Found]:
    """Return the results of one group of ranks: the first use of a compiler takes longest."""
    return run_ranks(2, on_ranks)


@pytest.mark.parametrize("number", range(len(STAGED)), ids=[f"{schedule}-{how.__name__}" for schedule, how in STAGED])
def test_compiled_blocks(number: int, by_rank: list[Found]) -> None:
    for staged, *_ in by_rank:
        assert max(staged[number]) < CLOSE, staged[number]


def test_compiled_blocks_with_slices(by_rank: list[Found]) -> None:
    for _, sliced, _ in by_rank:
        assert max(sliced) < 1e-5, sliced


def test_calls_compiled_around_blocks_are_refused(by_rank: list[Found]) -> None:
    for *_, errors in by_rank:
        assert all("compile() of each block" in text for text in errors)
        assert errors[2].startswith("model is compiled")
