"""Evaluation of models during a run, which leaves them as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from shardit.core.runtime.randomness import generators_kept


@contextmanager
def evaluation_mode(models: Mapping[str, nn.Module], device: torch.device) -> Iterator[None]:
    """Set models to evaluation, without gradients; afterwards generators and the mode of each module are as before."""
    before = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        with torch.no_grad(), generators_kept(device):
            for module, _ in before:
                module.training = False
            yield
    finally:
        for module, training in before:
            module.training = training
