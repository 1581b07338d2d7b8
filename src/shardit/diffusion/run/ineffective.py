"""Arguments that have no effect in a request, which pipelines drop without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCALES = ("true_cfg_scale", "guidance_scale")


def _guided(arguments: Mapping[str, Any], names: Mapping[str, Any], pipe: Any) -> bool | None:
    """Return whether the last call of a pipeline had classifier-free guidance; None if that is not known."""
    if "true_cfg_scale" in names:
        scale = arguments.get("true_cfg_scale", names["true_cfg_scale"].default)
        return scale > 1 if isinstance(scale, (int, float)) else None
    try:
        said = pipe.do_classifier_free_guidance
    except Exception:  # it has no such property, or one of values that this call did not set
        return None
    return said if isinstance(said, bool) else None


def ineffective(arguments: Mapping[str, Any], names: Mapping[str, Any], pipe: Any) -> list[str]:
    """Return a note for each argument that has no effect. arguments: those of the call; names: all that it takes."""
    notes = []
    negative = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    scale = arguments.get("true_cfg_scale")
    if isinstance(scale, (int, float)) and scale > 1 and "negative_prompt" in names and not negative:
        notes.append("true_cfg_scale has no effect without negative_prompt")
    empty = arguments.get("negative_prompt") == "" and arguments.get("negative_prompt_embeds") is None
    if negative and not empty and _guided(arguments, names, pipe) is False:
        scales = " or ".join(name for name in _SCALES if name in names)
        notes.append(f"the negative prompt has no effect without guidance: give {scales} above 1")
    for name, value in arguments.items():
        strength = isinstance(value, Mapping) and "scale" in value and name.endswith("attention_kwargs")
        if strength and not any(getattr(part, "peft_config", None) for part in pipe.components.values()):
            notes.append(f"{name}: scale has no effect without a LoRA")
    return notes
