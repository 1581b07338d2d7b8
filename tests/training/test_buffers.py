"""Buffers that a forward updates in training: as on one rank, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shardit import UnsupportedError, training
from shardit.training.limits import SCHEDULES
from tests.language import families
from tests.support.ranks import run_ranks
from tests.training.models import accumulate, text_loss, worst
from tests.training.runs import join

CLOSE = 2e-6
WIDTH = 8


class _Norm(nn.Module):
    """A norm over channels with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = _Norm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Counting(nn.Module):
    """A model with running statistics before and in blocks, and behind them if `late`."""

    def __init__(self, late: bool):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.embed = _Norm(), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(4))
        self.last = _Norm() if late else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(self.first(x))
        for block in self.blocks:
            h = block(h)
        return self.last(h)


def loss(model: Any, x: torch.Tensor) -> torch.Tensor:
    return (model(x) ** 2).mean() + model.embed.weight.sum() * 0.01


def batches(count: int) -> list[torch.Tensor]:
    return [torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(number)) for number in range(count)]


def counted(rank: int, size: int, method: str) -> tuple[dict[str, list[str]], str]:
    """The buffers and gradients of this rank that differ from one rank, by schedule; the error for a late norm."""
    join(rank, size, method)
    found: dict[str, list[str]] = {}
    for schedule in SCHEDULES:
        plain, model = Counting(False), Counting(False)
        staged = training.stages(model, loss, schedule=schedule, pipeline_parallel_size=size, timeout_s=30)
        for _ in range(2):
            accumulate(plain, loss, batches(4))
            staged.step(batches(4))
        expected = dict(plain.named_buffers())
        held = {name: one for name, one in model.named_buffers() if not one.is_meta}
        assert len(held) == 3 * 3
        found[schedule] = [name for name, one in held.items() if not torch.equal(one, expected[name])]
        found[schedule] += ["gradients"] * (worst(staged.named_parameters(), plain)[0] > CLOSE)
    with pytest.raises(UnsupportedError) as error:
        training.stages(Counting(True), loss, pipeline_parallel_size=size, timeout_s=30).step(batches(1))
    return found, str(error.value)


def test_each_micro_batch_counts_once() -> None:
    for found, error in run_ranks(2, counted, timeout=100):
        assert found == {schedule: [] for schedule in SCHEDULES}
        assert "updates last.inner." in error


def stretched(rank: int, size: int, method: str) -> list[float]:
    """Rotary tables that grow with the longest text so far: a number next to the buffer says how far."""
    join(rank, size, method)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    plain, model = (families.make("llama", max_position_embeddings=8, rope_parameters=rope) for _ in range(2))
    staged = training.stages(model, text_loss, pipeline_parallel_size=size, timeout_s=30)
    found = []
    for length in (11, 6, 14):
        generator = torch.Generator().manual_seed(length)
        texts = [torch.randint(3, families.VOCABULARY, (2, length), generator=generator) for _ in range(2)]
        expected = accumulate(plain, text_loss, texts)
        value = float(staged.step(texts))
        found += [abs(value / expected - 1), worst(staged.named_parameters(), plain)[0]]
    return found


def test_rotary_tables_that_grow() -> None:
    for found in run_ranks(2, stretched, timeout=60):
        assert max(found) < CLOSE, found
