"""A LoRA adapter as it is given to pipelines and language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Lora:
    """One adapter: a file, folder or hub id, the scale of its weights, and further arguments of `load_lora_weights`."""

    path: str
    scale: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
