"""`shardit train`."""

from __future__ import annotations

import os

from shardit.engine.process.exit_code import INTERRUPTED, OK
from shardit.engine.process.process import started_by_torchrun
from shardit.training.run.options.flags import RepeatedFlags as RepeatedFlags
from shardit.training.run.options.flags import TrainFlags


def train(flags: TrainFlags) -> int:
    """Train a LoRA or all weights of a diffusers pipeline or language model, over stages, tensor ranks and replicas."""
    from shardit.training.run.launch import run_here, run_joined
    from shardit.training.run.messages import SESSION, TrainSpec
    from shardit.training.run.options.check import check

    settings, config = flags.settings()
    recipe = check(settings, config)
    spec = TrainSpec(
        settings.model, config, timeout_s=settings.timeout_s, session=SESSION, settings=settings, recipe=recipe
    )
    early = run_joined(spec) if started_by_torchrun(os.environ) else run_here(spec)
    return INTERRUPTED if early else OK
