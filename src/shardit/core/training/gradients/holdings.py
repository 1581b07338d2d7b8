"""Parameters on the ranks of a cut model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from shardit.core.modules.blocks import CutModel, keeps


@dataclass
class Holdings:
    """The parameters of one stage.

    own: those that this stage has, by name; tied ones once. shared: those that several stages have, by name, on meta
    if this stage is none of them. owner: the first stage that has each parameter. ties: further names of parameters,
    and their first ones.
    """

    own: dict[str, nn.Parameter]
    shared: dict[str, nn.Parameter]
    owner: dict[str, int]
    ties: dict[str, str]

    @staticmethod
    def of(cut: CutModel, rank: int, size: int, replicate: Iterable[str]) -> Holdings:
        """Find the stages of each parameter, by the owners of blocks. Blocks of other stages still have their data."""
        everywhere, prefixes = tuple(range(size)), tuple(replicate)
        stages_of: dict[int, set[int]] = {}
        inside: set[int] = set()
        for (name, block), owner in zip(cut.blocks, cut.owners, strict=True):
            for path, parameter in block.named_parameters():
                inside.add(id(parameter))
                found = everywhere if keeps(f"{name}.{path}", prefixes) else (owner,)
                stages_of.setdefault(id(parameter), set()).update(found)
        for parameter in _outside(cut):
            stages_of[id(parameter)] = set(everywhere)
        named = dict(cut.model.named_parameters())
        stages = {name: stages_of[id(parameter)] for name, parameter in named.items()}
        first = {id(parameter): name for name, parameter in named.items()}
        every = cut.model.named_parameters(remove_duplicate=False)
        return Holdings(
            {name: parameter for name, parameter in named.items() if rank in stages[name]},
            {
                name: parameter if rank in stages[name] else nn.Parameter(torch.empty_like(parameter, device="meta"))
                for name, parameter in named.items()
                if len(stages[name]) > 1 and parameter.requires_grad
            },
            {name: min(of) for name, of in stages.items()},
            {name: first[id(parameter)] for name, parameter in every if name not in named},
        )

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters of this stage that require gradients."""
        return [parameter for parameter in self.own.values() if parameter.requires_grad]


def _outside(cut: CutModel) -> Iterable[nn.Parameter]:
    seen, todo = {id(block) for _, block in cut.blocks}, [cut.model]
    while todo:
        module = todo.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield from (one for one in module._parameters.values() if one is not None)
            todo += [child for child in module._modules.values() if child is not None]


def norm_of(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the sum of the squares of all gradients."""
    squares = [p.grad.detach().double().square().sum() for p in parameters if p.grad is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
