"""Settings that a language model does not have; found before torch is imported."""

from __future__ import annotations

from dataclasses import fields

from shardit.errors import InputError
from shardit.training.settings import TrainSettings

_OTHERS = (
    "background",
    "cache",
    "caption_dropout",
    "fps",
    "num_frames",
    "resolution",
    "shift",
    "timesteps",
    "train_text_encoder",
)
"""Settings that only diffusion has."""


def check_settings(settings: TrainSettings) -> None:
    """Raise InputError for a setting that a language model does not have."""
    plain = {one.name: getattr(TrainSettings(), one.name) for one in fields(TrainSettings)}
    wrong = next((name for name in _OTHERS if getattr(settings, name) != plain[name]), None)
    if wrong is not None:
        raise InputError(f"{wrong}: {settings.model} is a language model, which takes none; leave it out")
    if not settings.data:
        raise InputError("data is missing: give a JSONL file, or a folder of .jsonl and .txt files")
