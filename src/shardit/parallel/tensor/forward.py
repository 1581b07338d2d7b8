"""Wraps collective operations of a forward, so that a backward through them raises an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardit.core.modules.compiled import never_compiled
from shardit.errors import UnsupportedError
from shardit.parallel.tensor.plan import WHOLE


class _InferenceOnly(torch.autograd.Function):
    """A collective operation in an autograd graph: the forward is right, a backward through it is refused."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
        return act(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError("tensor parallelism is for inference: it has no backward")


def unless_whole(cut_forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap the forward of a cut module. Hooks of diffusers keep it on the instance, so it may also be called after the
    module has become whole (`whole.py`) and has its own class again: then that class's forward runs."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (type(self).forward if WHOLE in vars(self) else cut_forward)(self, *args, **kwargs)

    return forward


@never_compiled
def together(act: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """Return act(tensor), which may work in place; in an autograd graph, a backward through it raises
    UnsupportedError."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _InferenceOnly.apply(act, tensor)  # pyright: ignore[reportReturnType]
    return act(tensor)
