"""Calls that ranks compute without gradients: refused if gradients are requested, noted if they are missing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardit.errors import UnsupportedError

log = logging.getLogger(__name__)

_noted: set[str] = set()
"""Names of the classes whose missing gradients have been noted in this process."""


def refuse_gradients(model: nn.Module, leaves: Iterable[Any]) -> None:
    """Raise UnsupportedError if a call is to be differentiated with respect to the leaves of its arguments. The first
    rank warns once for each class if the result would have gradients for the model's parameters alone."""
    if not torch.is_grad_enabled():
        return
    name = type(model).__name__
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
        raise UnsupportedError(
            f"{name} is called for its gradients, but it runs without them over these ranks: use torch.no_grad(), or "
            "detach its arguments"
        )
    if name not in _noted and any(parameter.requires_grad for parameter in model.parameters()):
        _noted.add(name)
        if not dist.is_initialized() or dist.get_rank() == 0:
            log.warning("%s runs without gradients: its results have none outside of torch.no_grad(), either", name)
