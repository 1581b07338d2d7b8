"""Training of a model over pipeline stages and data replicas, with the gradients of one rank.

Names are imported when they are first used: the settings of `shardit train` are read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardit.config import DiffusionParallelConfig as ParallelConfig
    from shardit.training.staged import Stages, stages

_PLACES = {
    "ParallelConfig": ("shardit.config", "DiffusionParallelConfig"),
    "Stages": ("shardit.training.staged", "Stages"),
    "stages": ("shardit.training.staged", "stages"),
}

__all__ = ["ParallelConfig", "Stages", "stages"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)
