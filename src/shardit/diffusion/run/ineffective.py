"""Arguments that have no effect in a request, which pipelines drop without a word."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from shardit.settings.checks import float_of

_SCALES = ("true_cfg_scale", "guidance_scale")
_OF_GUIDANCE = ("guidance_scale_2", "guidance_rescale", "cfg_", "skip_layer_guidance", "skip_guidance_layers")
"""Prefixes of the names of arguments that have no effect without guidance."""

_NEEDS = {"skip_layer_guidance_": "skip_guidance_layers", "cfg_renorm_": "enable_cfg_renorm"}
"""Prefixes of the names of arguments that have no effect unless another one is set."""


def _guided(arguments: Mapping[str, Any], names: Mapping[str, Any], pipe: Any) -> bool | None:
    """Return whether the last call of a pipeline had classifier-free guidance; None if that is not known."""
    if "true_cfg_scale" in names:
        scale = arguments.get("true_cfg_scale", names["true_cfg_scale"].default)
        return float_of(scale) > 1 if isinstance(scale, Real) else None
    try:
        said = pipe.do_classifier_free_guidance
    except Exception:  # it has no such property, or one of values that this call did not set
        return None
    return said if isinstance(said, bool) else None


def _is_default(value: Any, parameter: Any) -> bool:
    return value is None or (isinstance(value, (bool, Real)) and value == parameter.default)


def _shifts(pipe: Any) -> bool:
    """Return whether the scheduler takes `mu`; a pipeline that passes its own on has None as the default."""
    return bool(getattr(getattr(getattr(pipe, "scheduler", None), "config", None), "use_dynamic_shifting", False))


def ineffective(arguments: Mapping[str, Any], names: Mapping[str, Any], pipe: Any) -> list[str]:
    """Return a note for each argument that has no effect. arguments: those of the call; names: all that it takes."""
    notes = []
    given = [name for name, value in arguments.items() if name in names and not _is_default(value, names[name])]
    negative = [value for name, value in arguments.items() if name.startswith("negative_prompt") and value is not None]
    scale = arguments.get("true_cfg_scale")
    if isinstance(scale, Real) and float_of(scale) > 1 and "negative_prompt" in names and not negative:
        notes.append("true_cfg_scale has no effect without negative_prompt")
    if _guided(arguments, names, pipe) is False:
        scale = next((name for name in _SCALES if name in names), "guidance")  # the first alone counts
        advice = f"has no effect without guidance: give a higher {scale}"
        notes += [f"the negative prompt {advice}"] if any(not isinstance(one, str) or one for one in negative) else []
        notes += [f"{name} {advice}" for name in given if name.startswith(_OF_GUIDANCE)]
    for name in given:
        needed = next((other for start, other in _NEEDS.items() if name.startswith(start)), None)
        if needed is not None and needed in names and not arguments.get(needed, names[needed].default):
            notes.append(f"{name} has no effect without {needed}")
    if "mu" in given and names["mu"].default is None and not _shifts(pipe):
        notes.append("mu has no effect with a scheduler without use_dynamic_shifting")
    if "last_image" in given and getattr(getattr(pipe, "config", None), "expand_timesteps", False):
        notes.append("last_image has no effect with this model, which continues the first image alone")
    for name, value in arguments.items():
        strength = isinstance(value, Mapping) and "scale" in value and name.endswith("attention_kwargs")
        if strength and not any(getattr(part, "peft_config", None) for part in pipe.components.values()):
            notes.append(f"{name}: scale has no effect without a LoRA")
    return notes
