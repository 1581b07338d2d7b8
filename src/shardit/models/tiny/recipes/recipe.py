"""Contents of a tiny checkpoint: plain data that `writer` turns into files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    """One component: the class that model_index.json names, and what it is built from.

    `kind` picks the prefetcher in `writer`: "model", "text", "tokenizer", "processor" or "scheduler".
    """

    kind: str
    library: str
    cls: str
    config: dict[str, Any] = field(default_factory=dict)
    shards: int = 1


@dataclass(frozen=True)
class Recipe:
    """One pipeline: its class, its components (None: listed in model_index.json, but absent) and a quick call."""

    pipeline: str
    parts: dict[str, Part | None]
    call: dict[str, Any]
    images: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    """File with trained weights, named COMPONENT.PARAMETER; without it they are made up."""
    prompt: str = ""
    """An example of what trained weights understand."""


def transformer(cls: str, **config: Any) -> Part:
    """Return a diffusers transformer, saved as several shards."""
    return Part("model", "diffusers", cls, config, shards=3)


def flow_euler(**config: Any) -> Part:
    """Return the flow-matching Euler scheduler of the image families."""
    return Part("scheduler", "diffusers", "FlowMatchEulerDiscreteScheduler", config)


def dynamic_shift(max_shift: float, **config: Any) -> Part:
    """Return the same with a shift that depends on the number of image tokens."""
    return flow_euler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=max_shift,
        base_image_seq_len=256,
        max_image_seq_len=8192 if max_shift < 1 else 4096,
        **config,
    )
