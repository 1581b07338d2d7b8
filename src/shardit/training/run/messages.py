"""Messages of a training run between the user's process and its ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardit.engine.process.messages import SessionSpec
from shardit.training.settings import TrainSettings

SESSION = "shardit.training.run.session:TrainSession"


@dataclass(frozen=True)
class TrainSpec(SessionSpec):
    """Start data of a rank of a run. recipe: the module whose function `recipe` makes the recipe of the model."""

    settings: TrainSettings = field(default_factory=TrainSettings)
    recipe: str = ""


@dataclass(frozen=True)
class Stop:
    """From the user's process to every rank: end after the present step, with a checkpoint."""


@dataclass(frozen=True)
class Began:
    """From a rank: its steps begin. Before, there is nothing to keep."""


@dataclass(frozen=True)
class Ended:
    """From a rank: the run is over. early: it was asked to stop before its last step."""

    early: bool
