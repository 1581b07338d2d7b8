"""Sums and gathers over ranks with their adjoints, for gradients through slices of weights.

The objective is F = sum over the P ranks of the loss that each computes, divided by P. Each operation has its exact
adjoint over all ranks together, so by the chain rule each rank gets the derivative of F by what it holds itself: that
of a slice is complete; that of a tensor of which several ranks have copies is the sum over the copies. No code has to
know which activations are whole, as the operators f and g of Megatron-LM (Shoeybi et al., 2019) have to.

Backward passes run these in the reverse order of the forward on each rank: autograd takes nodes by their age.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shardit.core.comm.collectives import Collectives
from shardit.core.modules.compiled import never_compiled
from shardit.errors import UnsupportedError


@never_compiled
def summed(ranks: Collectives, tensor: torch.Tensor, *learned: torch.Tensor | None) -> torch.Tensor:
    """Return the sum over the ranks, the same bits on each; without gradients in place.

    learned: parameters that another rank's summand was computed from; so either all ranks or none have a backward.
    """
    others = [one for one in learned if one is not None]
    if torch.is_grad_enabled() and any(one.requires_grad for one in (tensor, *others)):
        return _Sum.apply(ranks, tensor, *others)  # pyright: ignore[reportReturnType]
    return ranks.all_reduce(tensor)


@never_compiled
def joined(ranks: Collectives, part: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
    """Return the parts of all ranks, one after the other along `dim`, contiguous; lengths: of each rank's part."""
    if torch.is_grad_enabled() and part.requires_grad:
        return _Join.apply(ranks, part, lengths, dim)  # pyright: ignore[reportReturnType]
    # Contiguous, as the output of a whole linear is: code may view it in another shape.
    return ranks.all_gather(part, lengths, dim).contiguous()


@never_compiled
def of_first(ranks: Collectives, tensor: torch.Tensor) -> torch.Tensor:
    """Return the first rank's tensor, of which every rank has one of the same shape."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _OfFirst.apply(ranks, tensor)  # pyright: ignore[reportReturnType]
    return ranks.of_first(tensor)


class _Sum(torch.autograd.Function):
    """The adjoint of a sum that each rank gets is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, ranks: Collectives, tensor: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
        ctx.ranks, ctx.learned = ranks, len(learned)
        return ranks.all_reduce(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, _total(ctx.ranks, gradient), *(None,) * ctx.learned


class _Join(torch.autograd.Function):
    """The adjoint of a gather is the sum, on each rank, of the gradients of its part."""

    @staticmethod
    def forward(ctx: Any, ranks: Collectives, part: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
        ctx.ranks, ctx.lengths, ctx.dim = ranks, lengths, dim
        return ranks.all_gather(part, lengths, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, _checked(ctx.ranks).reduce_scatter(gradient, ctx.lengths, ctx.dim), None, None


class _OfFirst(torch.autograd.Function):
    """The adjoint of a broadcast is the sum on the first rank, and zero on the others."""

    @staticmethod
    def forward(ctx: Any, ranks: Collectives, tensor: torch.Tensor) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.of_first(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = _total(ctx.ranks, gradient)
        return None, total if ctx.ranks.index == 0 else total.zero_()


def _total(ranks: Collectives, gradient: torch.Tensor) -> torch.Tensor:
    return _checked(ranks).all_reduce(gradient.clone(memory_format=torch.contiguous_format))


def _checked(ranks: Collectives) -> Collectives:
    """Return the ranks. Raises UnsupportedError outside of training, where nobody divides the loss by their number, or
    sums the gradients of copies."""
    if not ranks.trains:
        raise UnsupportedError("tensor parallelism is for inference: it has no backward")
    return ranks
