"""The learning rate of each optimizer step, in closed form."""

from __future__ import annotations

import math

from shardit.errors import InputError
from shardit.training.settings import TrainSettings


def rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Return the learning rate of an optimizer step, counted from 0, of `steps` in all.

    During the warm-up it is the share step / warmup_steps of the full rate, so 0 in the first step. Afterwards,
    "cosine" and "linear" fall from the full rate to 0, which the step after the last would have.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if settings.lr_schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if settings.lr_schedule == "linear":
        return settings.learning_rate * (1 - done)
    return settings.learning_rate


def check_warmup(settings: TrainSettings, steps: int) -> None:
    """Raise InputError for a warm-up that is longer than the run of so many steps."""
    if settings.warmup_steps <= steps:
        return
    why = "" if settings.epochs is None else f" ({settings.epochs} {'epoch' if settings.epochs == 1 else 'epochs'})"
    raise InputError(
        f"warmup_steps={settings.warmup_steps} is more than steps={steps}{why}: give fewer, or more "
        f"{'steps' if settings.epochs is None else 'epochs'}"
    )
