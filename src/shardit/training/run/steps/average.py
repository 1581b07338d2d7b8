"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """The average of the parameters that this rank owns, in float32.

    After update n (counted from 0) it has moved by the share 1 - min(decay, (1 + n) / (10 + n)), so that early weights
    do not count for long.
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]):
        self.decay, self.updates = decay, 0
        self._parameters = parameters
        self.values = {name: one.detach().float().clone() for name, one in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the present weights."""
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in self.values.items():
            value.lerp_(self._parameters[name].detach().float(), share)
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the parameters for a while; afterwards they are as before, bit for bit."""
        before = {name: one.detach().clone() for name, one in self._parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
