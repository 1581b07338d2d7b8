"""Limits of sizes, lengths and counts, checked before anything of that size is made."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shardit.settings.checks import is_number

_SIDE = 1024
"""Side of results if neither the request nor the pipeline's signature sets it: the default of most families."""
_COUNTED = re.compile("steps|frames|tokens|length|^layers$")


@dataclass(frozen=True)
class ResultLimits:
    """Upper limits of a request. The defaults are beyond the results of any pipeline."""

    pixels: int = 2**28
    """Width x height of a result."""
    frames: int = 100_000
    """Frames of a video."""
    steps: int = 100_000
    """Denoising steps."""
    outputs: int = 10_000
    """Results of one request, layers of an image."""
    prompt_tokens: int = 2**20
    """Tokens to which a prompt may be padded (`max_sequence_length`)."""


def limit_problem(
    given: Mapping[str, Any], defaults: Mapping[str, Any], limits: ResultLimits
) -> tuple[str, str] | None:
    """Return the argument ("size" for width and height) that exceeds the limits, and the error.

    Checks products, lists, the pipeline's defaults, and its own arguments that are steps, frames or tokens by name.
    """
    asked = {name: value for name, value in {**defaults, **given}.items() if value is not None}
    if "num_inference_steps" not in given and ("sigmas" in asked or "timesteps" in asked):
        asked.pop("num_inference_steps", None)  # the pipeline then ignores it
    for name, value, limit, unit in (*_pixels(asked, limits), *_counts(asked, limits)):
        if value > limit:
            return name, f"is {value} {unit}, the limit is {limit}; ask for less"
    return None


_Amounts = list[tuple[str, float, int, str]]


def _pixels(asked: Mapping[str, Any], limits: ResultLimits) -> _Amounts:
    sides = {name: asked[name] for name in ("width", "height", "resolution") if is_number(asked.get(name))}
    found: _Amounts = [("resolution", sides.get("resolution", 0) ** 2, limits.pixels, "pixels")]
    if "width" in sides or "height" in sides:
        pixels = sides.get("width", _SIDE) * sides.get("height", _SIDE)
        found.insert(0, ("size", pixels, limits.pixels, "pixels"))
    return found


def _counts(asked: Mapping[str, Any], limits: ResultLimits) -> _Amounts:
    bounds = {"steps": limits.steps, "frames": limits.frames, "tokens": limits.prompt_tokens, "layers": limits.outputs}
    found: _Amounts = []
    for name, value in asked.items():
        if name == "num_outputs_per_prompt":
            found.append((name, value, limits.outputs, "outputs"))
        elif name.endswith(("sigmas", "timesteps")):
            found.append((name, _length(value), limits.steps, "steps"))
        elif (word := _COUNTED.search(name)) is not None:
            unit = "tokens" if word[0] == "length" else word[0]
            shown = "seconds" if name.endswith("_in_s") else unit
            found.append((name, max((one for one in _flat(value) if is_number(one)), default=0), bounds[unit], shown))
    return found


def _length(value: Any) -> int:
    """Return the number of entries; 0 for what is no list, such as a tensor of one number."""
    return len(value) if isinstance(value, Collection) and getattr(value, "ndim", 1) else 0


def _flat(value: Any) -> list[Any]:
    return [one for entry in value for one in _flat(entry)] if isinstance(value, list) else [value]
