"""Training of a model over pipeline stages and data replicas, with the gradients of one rank."""

from __future__ import annotations

from shardit.config import DiffusionParallelConfig as ParallelConfig
from shardit.training.staged import Stages, stages

__all__ = ["ParallelConfig", "Stages", "stages"]
