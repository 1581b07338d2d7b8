"""Gradients of a model whose weights are cut over tensor ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.placement.gathered import gathered
from shardit.core.placement.slices import Shards
from shardit.core.training.gradients.holdings import norm_of
from shardit.core.training.gradients.sums import sum_gradients


@dataclass(frozen=True)
class TensorSlices:
    """The slices of a model's parameters and buffers on a tensor rank.

    cuts: by name; everything else is whole on each rank. ranks: those of the tensor axis; None for one alone.
    """

    cuts: Mapping[str, Shards] = field(default_factory=dict)
    ranks: Collectives | None = None

    @property
    def count(self) -> int:
        """Number of tensor ranks."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def index(self) -> int:
        """The number of this rank among them."""
        return 0 if self.ranks is None else self.ranks.index

    def sum_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Sum the gradients of whole parameters over the ranks, and those of parts of which ranks have copies; all
        others are complete. Collective."""
        if self.ranks is None:
            return
        learning = {name: one for name, one in parameters.items() if one.requires_grad}
        whole = [one for name, one in learning.items() if name not in self.cuts]
        copied = {name: self.cuts[name] for name in learning if name in self.cuts and self.cuts[name].copied}
        spread = {name: _spread(learning[name], cut, self.ranks.index) for name, cut in copied.items()}
        sum_gradients([*whole, *spread.values()], self.ranks.group)
        for name, sums in spread.items():
            learning[name].grad = None if sums.grad is None else copied[name].of(self.ranks.index).take(sums.grad)

    def squares(self, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
        """Return the sum of the squares of the gradients, of those on several ranks on the first of them alone."""
        total = norm_of(one for name, one in parameters.items() if name not in self.cuts and self.index == 0)
        for name, one in parameters.items():
            cut = self.cuts.get(name)
            if cut is not None and one.grad is not None:
                runs = cut.first_runs(self.index) if cut.copied else [(0, one.shape[cut.dim])]
                total = total.to(one.device) + sum(
                    one.grad.narrow(cut.dim, *run).double().square().sum() for run in runs
                )
        return total

    def shape(self, name: str, part: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        cut = self.cuts.get(name)
        return tuple(part.shape) if cut is None else (*part.shape[: cut.dim], cut.total, *part.shape[cut.dim + 1 :])

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Return the whole tensor on each rank. Collective."""
        cut = self.cuts.get(name)
        return part if cut is None or self.ranks is None else gathered(part, cut, self.ranks)


def _spread(parameter: nn.Parameter, cut: Shards, rank: int) -> nn.Parameter:
    """Return a parameter of the whole shape, which has the gradient of this rank's slice in its places."""
    shape = list(parameter.shape)
    shape[cut.dim] = cut.total
    made = nn.Parameter(parameter.new_empty(shape))
    if parameter.grad is not None:
        made.grad = torch.zeros_like(made)
        for into, piece in cut.of(rank).pairs(made.grad, parameter.grad):
            into.add_(piece)
    return made
