"""What modules do after their weights were cut: class swaps that sum or gather over the ranks of the tensor axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.collectives import Collectives
from ..core.sites import swap_class
from ..errors import UnsupportedError
from .tensor_cuts import Role


def install_role(module: nn.Module, role: Role, ranks: Collectives) -> None:
    """Give a module whose weight is cut the forward that goes with its role, in place."""
    swap_class(module, {"forward": _FORWARDS[role.kind](role, ranks)})


def _rows(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """A linear cut by its inputs: each rank's part of the product, then one sum."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        # The bias is part of one summand: that costs no pass of its own.
        partial = F.linear(input, self.weight, self.bias if ranks.index == 0 else None)
        return _together(ranks.all_reduce, partial)

    return forward


def _gathered(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """A linear cut by its outputs, for readers that need all of them."""
    lengths = role.shards.lengths

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        part = F.linear(input, self.weight, self.bias)
        return _together(lambda tensor: ranks.all_gather(tensor, lengths, -1), part)

    return forward


def _vocabulary(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """A table cut by rows: zeros for the rows of others, then one sum, which is exact."""
    total = role.shards.total
    ((start, length),) = role.shards.of(ranks.index).segments

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if input.device.type == "cpu" and input.numel() and not 0 <= int(input.min()) <= int(input.max()) < total:
            raise IndexError(f"a token id is not below {total}")  # as the whole table would; else it became a zero
        local = input - start
        others = (local < 0) | (local >= length)
        rows = F.embedding(local.masked_fill(others, 0), self.weight)
        return _together(ranks.all_reduce, rows.masked_fill(others.unsqueeze(-1), 0))

    return forward


def _norm(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """An RMSNorm over channels that are cut: the sum of squares is summed over the ranks."""
    total = role.shards.total

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        squares = _together(ranks.all_reduce, wide.square().sum(-1, keepdim=True))
        eps = torch.finfo(hidden_states.dtype).eps if self.eps is None else self.eps
        scaled = wide * torch.rsqrt(squares / total + eps)
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return (scaled.to(self.weight.dtype) if half else scaled) * self.weight

    return forward


_FORWARDS = {"rows": _rows, "gathered": _gathered, "vocabulary": _vocabulary, "norm": _norm}


class _InferenceOnly(torch.autograd.Function):
    """What ranks do together, in a graph: the forward is right, a backward through it is refused."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
        return act(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError("tensor parallelism is for inference: it has no backward")


def _together(act: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _InferenceOnly.apply(act, tensor)  # pyright: ignore[reportReturnType]
    return act(tensor)
