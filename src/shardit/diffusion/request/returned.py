"""Classifies the fields of pipelines' results as videos, images, sound or text, and finds the declared fields of a
pipeline class."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

Kind = Literal["video", "image", "audio", "text", "tensors"]

VIDEO = ("frames", "video", "videos")
IMAGES = ("images", "image", "rgb")
MAPS = ("prediction",)
"""Numbers by pixel (depth, normals, materials) that can be shown as images."""
SOUND = ("audio", "audios", "sound", "waveform", "waveforms")
TEXT = ("text", "texts")

_KINDS: dict[Kind, tuple[str, ...]] = {"video": VIDEO, "image": (*IMAGES, *MAPS), "audio": SOUND, "text": TEXT}


def kinds_of(fields: Iterable[str]) -> tuple[Kind, ...]:
    """Return the kinds of an output with these fields, the most significant first; ("tensors",) if nothing can be
    shown."""
    given = set(fields)
    return tuple(kind for kind, names in _KINDS.items() if given & set(names)) or ("tensors",)


def declared_fields(pipeline_class: type) -> tuple[str, ...]:
    """Return the fields of the output classes in `__call__`, in order; () if there are none (a plain tuple, a custom
    class)."""
    found: dict[str, None] = {}
    for code, names in _bodies(pipeline_class):
        for name in code.co_names:
            each = names.get(name)
            if isinstance(each, type) and _is_output(each):
                found.update(dict.fromkeys(item.name for item in dataclasses.fields(each)))
        if found:
            break
    return tuple(found)


def sample_rate_of(components: Mapping[str, Any]) -> int | None:
    """Return samples per second of the sound that these components make, from their configurations; None without one.

    The component that makes the waveform comes first: a vocoder, then those for sound by name, then any other.
    """

    def place(name: str) -> int:
        return next((at for at, part in enumerate(("vocoder", "audio", "sound", "vae")) if part in name), 9)

    for name in sorted(components, key=place):
        config = getattr(components[name], "config", None)
        for key in ("output_sampling_rate", "output_sample_rate", "sampling_rate", "sample_rate"):
            rate = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
            if isinstance(rate, int) and not isinstance(rate, bool) and rate > 0:
                return rate
    return None


def _bodies(pipeline_class: type) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield code and global names of `__call__`, then of those that it overrides."""
    for base in pipeline_class.__mro__:
        method = vars(base).get("__call__")
        plain = inspect.unwrap(method) if callable(method) else None
        if plain is not None and hasattr(plain, "__code__"):
            yield plain.__code__, plain.__globals__


def _is_output(found: type) -> bool:
    # By name, so that this module needs no diffusers. Outputs of models are mentioned for other reasons.
    bases = [base.__name__ for base in found.__mro__]
    return dataclasses.is_dataclass(found) and "BaseOutput" in bases and ".models." not in found.__module__
