"""Signatures and notes of the model before its ranks have loaded it, so that requests can be checked at once: kept in
the store by an earlier start, or read from the files of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from shardit.diffusion.preflight.static_signature import static_signatures_of_model
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.errors import InputError
from shardit.server.jobs.store import Store

_NAME = "model_info"
_SIGNATURES = ("signature", "signature_with_image")


def remember(store: Store, model: str, info: Mapping[str, Any]) -> None:
    """Keep what is known of `model`."""
    kept: dict[str, Any] = {"model": model, "notes": list(info.get("notes", ()))}
    for name in _SIGNATURES:
        signature = info.get(name)
        kept[name] = None if signature is None else dataclasses.asdict(signature)
    if store.recall(_NAME) != kept:
        store.remember(_NAME, kept)


def recall(store: Store, model: str) -> dict[str, Any]:
    """What was kept of `model`; empty where that is nothing."""
    kept = store.recall(_NAME)
    if not isinstance(kept, dict) or kept.get("model") != model:
        return {}
    info: dict[str, Any] = {"notes": kept["notes"]}
    for name in _SIGNATURES:
        info[name] = None if kept[name] is None else _signature(kept[name])
    return info


def from_files(model: str) -> dict[str, Any]:
    """Read the signatures from the files of `model`, before it is loaded; empty if they do not suffice."""
    try:
        plain, with_image = static_signatures_of_model(model)
    except (InputError, OSError):  # the ranks report it
        return {}
    return {} if plain is None else {"signature": plain, "signature_with_image": with_image, "notes": []}


def _signature(kept: Mapping[str, Any]) -> PipelineSignature:
    # JSON has lists only. What other versions of this program knew and this one does not is left out.
    names = {item.name for item in dataclasses.fields(PipelineSignature)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in kept.items() if name in names
    }
    return PipelineSignature(**values)
