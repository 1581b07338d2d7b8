"""Signatures and notes of the model before its ranks have loaded it, so that requests can be checked at once: stored by
an earlier start, or read from the files of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from shardit.diffusion.preflight.static_signature import static_signatures_of_model
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.errors import InputError
from shardit.language.info import LanguageInfo
from shardit.language.loading.source import decoder_source
from shardit.language.preflight import info_of_files
from shardit.server.http.state.live_state import Info
from shardit.server.jobs.store import Store

_NAME = "model_info"
_OF_LANGUAGE = ("max_model_len", "vocabulary", "defaults", "notes")
"""Kept data of a language model."""
_OF_TUPLES = ("forms", "missing")
"""Fields of a signature whose values are tuples."""


def remember(store: Store, model: str, info: Info) -> None:
    """Store the facts about `model`."""
    if isinstance(info, LanguageInfo):
        stored: dict[str, Any] = {"language": {name: getattr(info, name) for name in _OF_LANGUAGE}}
    else:
        signatures = [dataclasses.asdict(signature) for signature in info.signatures]
        stored = {"notes": info.notes, "signatures": signatures}
    store.remember(_NAME, {"model": model, **stored})


def recall(store: Store, model: str) -> Info | None:
    """Return the stored facts about `model`, if any."""
    kept = store.recall(_NAME)
    if not isinstance(kept, dict) or kept.get("model") != model:
        return None
    if "language" in kept:
        return LanguageInfo(**{name: kept["language"].get(name) for name in _OF_LANGUAGE})
    if "signatures" not in kept:
        return None
    return ModelInfo(*map(_signature, kept["signatures"]), notes=tuple(kept["notes"]))


def from_files(model: str, of_language: bool = False) -> Info | None:
    """Read the facts from the files of `model`, before it is loaded; None if the files are not sufficient."""
    if of_language:
        return _of_language(model)
    try:
        plain, with_image = static_signatures_of_model(model)
    except (InputError, OSError):  # the ranks report it
        return None
    return None if plain is None else ModelInfo(plain, with_image)


def _of_language(model: str) -> LanguageInfo | None:
    try:
        return info_of_files(decoder_source(model))
    except (InputError, OSError):
        return None


def _signature(kept: Mapping[str, Any]) -> PipelineSignature:
    # JSON has lists only, which are tuples in all fields but `defaults`. Fields of other versions of this program that
    # this one does not know are left out.
    names = {item.name for item in dataclasses.fields(PipelineSignature)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in kept.items() if name in names
    }
    for name in _OF_TUPLES:
        values[name] = {key: tuple(value) for key, value in values.get(name, {}).items()}
    return PipelineSignature(**values)
