"""Hidden states that hooks on blocks collect, and that a model returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import shardit
from shardit import DiffusionParallelConfig
from shardit.core.runtime.pending import materialize
from tests.diffusion.test_parallelize import join
from tests.support.ranks import run_ranks


class Collects(nn.Module):
    """Returns what its blocks get and give, as hooks see it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)])
        self.seen: list[torch.Tensor] = []
        self.rows: list[int] = []
        for block in self.blocks:
            block.register_forward_hook(self.note)

    def note(self, block: nn.Module, args: Any, out: torch.Tensor) -> None:
        self.seen += [args[0], out]
        self.rows.append(out.shape[1])

    def forward(self, hidden_states: torch.Tensor) -> dict[str, Any]:
        self.seen, self.rows = [], []
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return {"last": hidden_states, "all": tuple(self.seen)}


def collected(rank: int, count: int, method: str) -> tuple[list[int], list[int]]:
    join(rank, count, method)
    plain = Collects()
    other: Any = shardit.parallelize(Collects(), DiffusionParallelConfig(ulysses_degree=2), timeout_s=30)
    for length in (9, 9, 6):
        tokens = torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected, got = plain(tokens), other(tokens)
        materialize(got)
        assert len(expected["all"]) == len(got["all"]) == 6
        for a, b in zip((expected["last"], *expected["all"]), (got["last"], *got["all"]), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    return plain.rows, other.rows


def test_collected_states_are_whole() -> None:
    """While the hooks run, a rank has its own tokens only."""
    for plain, sharded in run_ranks(2, collected):
        assert plain == [6, 6, 6]
        assert sharded == [3, 3, 3]
