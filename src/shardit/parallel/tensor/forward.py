"""Forwards of cut modules that may be whole again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardit.parallel.tensor.plan import WHOLE


def unless_whole(cut_forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap the forward of a cut module. Hooks of diffusers keep it on the instance, so it may also be called after the
    module has become whole (`gather_module.py`) and has its own class again: then that class's forward runs."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (type(self).forward if WHOLE in vars(self) else cut_forward)(self, *args, **kwargs)

    return forward
