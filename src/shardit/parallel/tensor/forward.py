"""What ranks do together in a forward, so that nobody takes a backward through it for right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardit.errors import UnsupportedError
from shardit.parallel.tensor.plan import WHOLE


class _InferenceOnly(torch.autograd.Function):
    """What ranks do together, in a graph: the forward is right, a backward through it is refused."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
        return act(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError("tensor parallelism is for inference: it has no backward")


def unless_whole(cut_forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward of a cut module. Hooks of diffusers keep it on the instance, so it is also called when the module has
    become whole (`tensor_whole.py`) and has its own class again: then that one's forward runs."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (type(self).forward if WHOLE in vars(self) else cut_forward)(self, *args, **kwargs)

    return forward


def together(act: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """act(tensor), which may work in place; in a graph, a backward through it raises UnsupportedError."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _InferenceOnly.apply(act, tensor)  # pyright: ignore[reportReturnType]
    return act(tensor)
