"""A LoRA adapter as it is given to pipelines and language models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardit.errors import InputError
from shardit.settings.checks import is_number
from shardit.settings.paths import check_name, is_hub_id, user_path

SECOND = "transformer_2"
"""The component of the second expert."""
INTO_SECOND = f"load_into_{SECOND}"
"""The argument of `load_lora_weights` for an adapter of the second expert."""


@dataclass(frozen=True)
class Lora:
    """One adapter: a file, folder or hub id, the scale of its weights, and further arguments of `load_lora_weights`."""

    path: str
    scale: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


def loras(value: Any) -> tuple[Lora, ...]:
    """Return adapters as `model_options` takes them. Raises InputError."""
    pair = isinstance(value, tuple) and len(value) == 2 and is_number(value[1])
    if isinstance(value, (str, os.PathLike, Mapping)) or pair:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise InputError(f"lora must be a path or a list of paths, got {value!r}")
    return tuple(map(_lora, value))


def _lora(value: Any) -> Lora:
    if isinstance(value, Lora):
        path, scale, more = value.path, value.scale, value.arguments
    elif isinstance(value, str):
        second = value.startswith(f"{SECOND}=")
        path, scale = parse_lora(value[len(SECOND) + 1 :] if second else value)
        more = {INTO_SECOND: True} if second else {}
    elif isinstance(value, os.PathLike):
        path, scale, more = os.fspath(value), 1.0, {}
    elif isinstance(value, tuple) and len(value) == 2:
        path, scale, more = *value, {}
    elif isinstance(value, Mapping) and "path" in value:
        more = {name: one for name, one in value.items() if name not in ("path", "scale")}
        path, scale = value["path"], value.get("scale", 1.0)
    else:
        raise InputError(f'lora must be a path, (path, scale) or {{"path": ..., "scale": ...}}, got {value!r}')
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise InputError(f"lora must name a file, a folder or a hub id, got {path!r}")
    if not is_number(scale):
        raise InputError(f"lora {os.fspath(path)}: the scale must be a finite number, got {scale!r}")
    for name in more:
        if not isinstance(name, str) or name in ("adapter_name", "pretrained_model_name_or_path_or_dict", "hotswap"):
            raise InputError(f"lora {os.fspath(path)}: {name!r} cannot be given")
    found = _existing(os.fspath(path))
    inside = Path(found) / str(more.get("subfolder") or "")
    if Path(found).is_dir() and not any(inside.glob("*.safetensors")):
        raise InputError(f"lora {inside} has no .safetensors file: correct the path")
    return Lora(found, float(scale), more)


def parse_lora(text: str) -> tuple[str, float]:
    """Return PATH and scale of "PATH[:SCALE]". A path may contain colons: only a number after the last one is a
    scale."""
    path, colon, last = text.rpartition(":")
    try:
        scale = float(last)
    except ValueError:
        return text, 1.0
    check_name("lora", text)
    return (path, scale) if colon and path and not Path(text).exists() else (text, 1.0)


def _existing(path: str) -> str:
    """Return the path. Raises InputError if it neither exists on this disk nor has the form of a hub id."""
    found = user_path("lora", path)
    if found.is_file() and found.suffix != ".safetensors":
        raise InputError(f"lora {path} is no .safetensors file: pickles can run code, convert it first")
    if found.exists():
        return str(found.resolve())
    if "/" not in path or not is_hub_id(path) or path.endswith(".safetensors"):
        raise InputError(f"lora {path} does not exist: correct the path")
    return path
