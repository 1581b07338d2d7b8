"""Gradients of the weights of linears that are computed later than those of their inputs, as zero-bubble schedules
want it.

torch's own weight pass takes the graph of autograd apart, and frees parts that several parameters share: the gradients
are wrong then. Here each linear notes what it needs, and the graph stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shardit.core.modules.patching import subclass_in_place


class Deferred:
    """The weight gradients that are still to be computed on this rank."""

    def __init__(self) -> None:
        self._todo: list[Callable[[], None]] = []
        self._active = False

    def install(self, module: nn.Module) -> None:
        """Defer those of the linears in a module, during `active`; not inside of compiled calls, which stay whole."""
        compiled = {
            id(inner) for one in module.modules() if one._compiled_call_impl is not None for inner in one.modules()
        }
        for linear in [one for one in module.modules() if type(one) is nn.Linear and id(one) not in compiled]:
            subclass_in_place(linear, {"forward": self._forward()})

    @contextmanager
    def active(self) -> Iterator[None]:
        """Defer gradients for a while."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._todo = []

    def builder(self) -> Callable[[], None]:
        """Return what computes the gradients noted since the last call: torch calls this after each backward."""
        todo, self._todo = self._todo, []

        def run() -> None:
            with torch.no_grad():
                for one in todo:
                    one()

        return run

    def _note(self, later: Callable[[], None]) -> None:
        self._todo.append(later)

    def _forward(self) -> Callable[..., torch.Tensor]:
        def forward(linear: nn.Linear, input: torch.Tensor) -> torch.Tensor:
            learns = linear.weight.requires_grad and torch.is_grad_enabled()
            cast = torch.is_autocast_enabled(input.device.type)
            if not self._active or not learns or cast or _watched(linear.weight) or input.dim() < 2:
                return functional.linear(input, linear.weight, linear.bias)
            out: Any = _Linear.apply(input, linear.weight, linear.bias, self._note)
            return out

        return forward


def _watched(weight: torch.Tensor) -> bool:
    """Return whether others want the gradient of a weight: those that it was made of (say, a norm and a direction), or
    hooks."""
    return not weight.is_leaf or bool(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        x, weight, bias, ctx.note = given
        ctx.save_for_backward(x)
        ctx.parameters = weight, bias  # what checkpointing gives back of saved tensors is not the parameter itself
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (x,), (weight, bias) = gradients, ctx.saved_tensors, ctx.parameters

        def later() -> None:
            rows = gradient.flatten(0, -2)
            _add(weight, rows.t() @ x.flatten(0, -2))
            if bias is not None and bias.requires_grad:
                _add(bias, rows.sum(0))

        ctx.note(later)
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None, None


def _add(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
