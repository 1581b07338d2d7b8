"""Compiled blocks, with checkpointing and in half precision, over stages."""

from __future__ import annotations

import functools
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


def compiled(rank: int, size: int, method: str, schedule: str, how: Callable[..., None], **axes: int) -> list[float]:
    """A step with compiled blocks, compared with one rank without; return the largest differences."""
    join(rank, size, method)
    chosen = task("llama")
    plain, model = chosen.build(), chosen.build()
    how(model, model.model.layers)  # pyright: ignore
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    axes = axes or {"pipeline_parallel_size": size}
    staged = training.stages(model, chosen.loss, schedule=schedule, timeout_s=60, **axes)
    batches = [chosen.batch(number, False) for number in range(3)]
    expected = accumulate(plain, chosen.loss, batches)
    value = float(staged.step(batches))
    largest, compared, only = worst(staged.named_parameters(), plain, staged.slices)
    assert compared
    assert not only, only
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    return [abs(value / expected - 1), largest]


@pytest.mark.parametrize(("schedule", "how"), [("zbv", in_place), ("1f1b", wrapped), ("zbv", parts)])
def test_compiled_blocks(schedule: str, how: Callable[..., None]) -> None:
    for found in run_ranks(2, functools.partial(compiled, schedule=schedule, how=how), timeout=120):
        assert max(found) < CLOSE, found


def test_compiled_blocks_with_slices() -> None:
    on_slices = functools.partial(compiled, schedule="1f1b", how=wrapped, tensor_parallel_size=2)
    for found in run_ranks(2, on_slices, timeout=120):
        assert max(found) < 1e-5, found


def compiled_whole(rank: int, size: int, method: str) -> list[str]:
    """The errors for models that are compiled around their blocks."""
    join(rank, size, method)
    found = []
    for change in (
        lambda model: torch.compile(model, backend=BACKEND),
        lambda model: model.compile(backend=BACKEND) or model,
        lambda model: model.model.compile(backend=BACKEND) or model,
    ):
        with pytest.raises(UnsupportedError) as error:
            training.stages(change(task("llama").build()), task("llama").loss, pipeline_parallel_size=size)
        found.append(str(error.value))
    return found


def test_calls_compiled_around_blocks_are_refused() -> None:
    for found in run_ranks(2, compiled_whole, timeout=60):
        assert all("compile() of each block" in text for text in found)
        assert found[2].startswith("model is compiled")
