"""Writes through `.data` of slices, which torch does not count: noticed in the next call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.parallel.tensor.check.taken_data import SliceParameter, watch_data, written_by_data
from tests.diffusion.test_changes import flux, run
from tests.diffusion.test_parallelize import join
from tests.support.ranks import run_ranks


def watched() -> nn.Parameter:
    parameter = nn.Parameter(torch.arange(12.0).view(3, 4))
    watch_data(parameter)
    return parameter


def test_what_is_taken_and_not_written_is_let_go() -> None:
    parameter = watched()
    assert type(parameter) is SliceParameter
    row = parameter.data[1]
    assert not written_by_data(parameter)
    row += 1  # through a view that somebody has kept
    assert written_by_data(parameter)
    parameter = watched()
    assert float(parameter.data.sum()) == 66
    assert not written_by_data(parameter)
    assert "shardit_lent" not in vars(parameter)


def test_every_way_of_writing_by_data() -> None:
    first, second, third = watched(), watched(), watched()
    first.data.mul_(2)
    second.data = second.data * 2
    third.data[1, 2] = 7
    assert [written_by_data(one) for one in (first, second, third)] == [True] * 3
    watch_data(first)
    assert not written_by_data(first)


def test_libraries_and_copies() -> None:
    linear = nn.Linear(3, 4)
    watch_data(linear.weight)  # type: ignore[arg-type]
    linear.to(torch.float64)
    assert linear.weight.dtype == torch.float64
    assert "shardit_lent" not in vars(linear.weight)
    assert type(copy.deepcopy(linear).weight) is SliceParameter
    copied = nn.Parameter(linear.weight, requires_grad=False)
    assert (type(copied), copied.requires_grad) == (SliceParameter, False)
    torch.optim.SGD(linear.parameters(), lr=1.0)
    assert torch.equal(linear(torch.ones(3, dtype=torch.float64)), linear.weight.sum(1) + linear.bias)


def on_rank(rank: int, count: int, method: str) -> list[Any]:
    join(rank, count, method)
    pipe = shardit.parallelize(flux(), DiffusionParallelConfig(tensor_parallel_size=2), timeout_s=60)
    weight = pipe.transformer.transformer_blocks[1].attn.to_q.weight
    first = run(pipe)
    norms = [float(p.data.norm()) for p in pipe.transformer.parameters()]
    said: list[Any] = [torch.equal(first, run(pipe)), len(norms) > 0]
    weight.data[0] = 0
    with pytest.raises(UnsupportedError) as caught:
        run(pipe)
    return [*said, str(caught.value).split(" after ")[0]]


def test_refused_on_all_ranks() -> None:
    found = run_ranks(2, on_rank)
    assert found == [[True, True, "transformer.transformer_blocks.1.attn.to_q.weight was written to"]] * 2
