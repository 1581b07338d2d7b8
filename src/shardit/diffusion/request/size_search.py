"""Finds required multiples of heights and widths by trying."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

SIDES = ("height", "width")
SIDE = 1024
"""A side, in pixels, that every known pipeline takes: a multiple of the factors of any VAE and patch size."""
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)


def search(takes: Callable[[int, int], bool]) -> dict[str, int]:
    """Return the numbers that height and width must be multiples of, by name; empty if any size is valid, or none.
    takes: returns whether a height and a width are valid."""
    found: dict[str, int] = {}
    if not takes(SIDE, SIDE):
        return found
    for position, name in enumerate(SIDES):
        sides = ([SIDE + step if place == position else SIDE for place in range(2)] for step in _MULTIPLES)
        fits = (step for step, (height, width) in zip(_MULTIPLES, sides, strict=True) if takes(height, width))
        if (step := next(fits, 1)) > 1:
            found[name] = step
    return found


def found_least_sides(parts: Mapping[str, Any], arguments: Container[str]) -> dict[str, int]:
    """Return the least height and width that leave latents, by name, for a pipeline with these arguments and
    attributes: pipelines that round sizes down have a processor of images that rounds in the same steps."""
    processors = (part for name, part in parts.items() if name.endswith("_processor"))
    steps = (getattr(getattr(part, "config", None), "vae_scale_factor", None) for part in processors)
    least = max((step for step in steps if isinstance(step, int)), default=1)
    return {name: least for name in SIDES if name in arguments and least > 1}
