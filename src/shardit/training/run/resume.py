"""Identity of a run for its checkpoints, and the allowed differences when it resumes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardit.config import DiffusionParallelConfig
from shardit.errors import InputError
from shardit.training.data.identity import difference
from shardit.training.recipe import TrainingRecipe
from shardit.training.run.model_digest import contents_of, snapshot_of
from shardit.training.settings import TrainSettings

_FREE = (
    "accumulation",  # times the replicas; see `_check_stream`
    "cache",
    "keep",
    "output",
    "resume",
    "sample_every",
    "sample_prompts",
    "save_every",
    "tensorboard",
    "timeout_s",
    "validate_every",
    "validation_data",
)
"""Settings that may differ without a word."""

_NOTED = (
    "data",  # the identity of the recipe shows whether it is other data
    "ema_decay",
    "epochs",
    "gradient_checkpointing",
    "learning_rate",
    "lora_dropout",
    "lr_schedule",
    "max_grad_norm",
    "optimizer_args",
    "schedule",
    "shard_optimizer",
    "steps",
    "warmup_steps",
    "weight_decay",
)
"""Settings that may differ, with a note. All others must be the same."""


def record_of(settings: TrainSettings, config: DiffusionParallelConfig, recipe: TrainingRecipe) -> dict[str, Any]:
    """Return a checkpoint's record of its run, as JSON values."""
    found = {
        "settings": dataclasses.asdict(settings),
        "data_parallel_size": config.data_parallel_size,
        "identity": dict(recipe.identity),
        "model_contents": contents_of(settings.model),
        "model_snapshot": snapshot_of(settings.model),  # its name is the commit on the hub
    }
    return json.loads(json.dumps(found, default=_plain))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Return notes on what differs between the run of a checkpoint and this one. Raises InputError if the run could
    not go on rightly."""
    old, new = before["settings"], now["settings"]
    contents = before.get("model_contents")  # None: no local files, or a checkpoint of an earlier version
    kept = contents == now["model_contents"]
    if contents is not None and not kept and old["model"] == new["model"]:
        _check_commits(new["model"], before.get("model_snapshot"), now["model_snapshot"], folder)
    notes = []
    for name in new:
        was, given = old.get(name), new[name]
        if was == given or name in _FREE:
            continue
        text = f"{name} was {_shown(was)} and is {_shown(given)}"
        moved = name == "model" and contents is not None and kept
        if name not in _NOTED and not moved:
            raise InputError(f"--resume: {text}; give it as before, or choose another --output than {folder}")
        notes.append(f"resumed run: {text}")
    _check_stream(before, now)
    if changed := difference(before["identity"], now["identity"]):
        raise InputError(f"--resume: {changed}; give the data as before, or choose another --output than {folder}")
    return notes


def _check_commits(model: str, old: str | None, new: str | None, folder: Path) -> None:
    """Raise InputError for a model of other contents, unless it has the same commit on the hub: its folder in the cache
    may have got more files."""
    if old is None or new is None:
        remedy = f"{model} has other weights or configurations than when the run began; put those back"
    elif Path(old).name == Path(new).name:
        return
    else:
        remedy = (
            f"{model} is at commit {Path(new).name} on the hub, with other weights or configurations than at "
            f"{Path(old).name}, with which the run began; give --model {old}"
        )
    raise InputError(f"--resume: {remedy}, or choose another --output than {folder}")


def _check_stream(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError if a step takes another number of micro-batches: its number gives the place in the data."""
    (was, _), (given, replicas) = (
        (one["settings"]["accumulation"] * one["data_parallel_size"], one["data_parallel_size"])
        for one in (before, now)
    )
    if was == given:
        return
    fits = was % replicas == 0
    remedy = f"use accumulation={was // replicas}" if fits else f"use data_parallel_size={before['data_parallel_size']}"
    raise InputError(
        f"--resume: a step had {was} micro-batches (accumulation x data_parallel_size) and would have {given}: {remedy}"
    )


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
