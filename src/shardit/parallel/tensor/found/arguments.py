"""Arguments with which a module can be tried: small random tensors if its forward needs some."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from shardit.parallel.tensor.found.stand_ins import KIND
from shardit.parallel.tensor.rules import Family

TOKENS = 3
"""Length of the sequence of tokens."""

MOST_NEEDED = 5
"""Most arguments that a module may need."""


def candidates(
    module: nn.Module, width: int, convolved: bool, family: Family
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield arguments to try, first those that most modules take. width: of the input; convolved: it is an image
    or a video."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in named if p.default is p.empty][1:]
    if not named or len(needed) >= MOST_NEEDED:
        return
    second = [p.name for p in named[1:] if p.name in family.second_inputs]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, **KIND)

    others = [name for name in needed if name not in family.second_inputs]
    images = ((1, width, 4, 4), (1, 2, 2, 2, width))
    for shape in images if convolved else ((1, TOKENS, width), (2, width)):
        for table, other in ((None, draw(1, width)), (draw(TOKENS, 2), draw(1, width)), (None, None)):
            given = {name: table if any(part in name for part in family.rotary_inputs) else other for name in others}
            if second:
                yield (draw(*shape),), {**given, **{name: draw(1, 2, width) for name in second}}
            if not any(name in family.second_inputs for name in needed):
                yield (draw(*shape),), given
            if not others:
                break
