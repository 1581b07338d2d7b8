"""The files of a run in its folder."""

from __future__ import annotations

METRICS = "metrics.jsonl"
"""One row for each optimizer step."""

EVENTS = "tensorboard"

SAMPLES = "samples"

CHECKPOINTS = "checkpoints"
"""A folder `step-...` for each checkpoint."""

RECORD = "run.json"
"""The file of a checkpoint that is written last: what the run was."""

AVERAGE = "ema"
"""The result with the averaged weights."""
