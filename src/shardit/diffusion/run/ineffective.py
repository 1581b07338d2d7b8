"""Arguments that have no effect in a request, which pipelines drop without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ineffective(arguments: Mapping[str, Any], names: Mapping[str, Any], pipe: Any) -> list[str]:
    """Return a note for each argument that has no effect. arguments: those of the call; names: all that it takes."""
    notes = []
    negative = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    scale = arguments.get("true_cfg_scale")
    if isinstance(scale, (int, float)) and scale > 1 and "negative_prompt" in names and not negative:
        notes.append("true_cfg_scale has no effect without negative_prompt")
    for name, value in arguments.items():
        strength = isinstance(value, Mapping) and "scale" in value and name.endswith("attention_kwargs")
        if strength and not any(getattr(part, "peft_config", None) for part in pipe.components.values()):
            notes.append(f"{name}: scale has no effect without a LoRA")
    return notes
