"""What heights and widths must be multiples of, found by trying."""

from __future__ import annotations

from collections.abc import Callable

SIDES = ("height", "width")
SIDE = 1024
"""A side, in pixels, that every known pipeline takes: a multiple of whatever a VAE and patches need."""
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)


def search(takes: Callable[[int, int], bool]) -> dict[str, int]:
    """The numbers that height and width must be multiples of, by name, where `takes` tells whether a height and a width
    are taken; empty where any is, or none."""
    found: dict[str, int] = {}
    if not takes(SIDE, SIDE):
        return found
    for position, name in enumerate(SIDES):
        sides = ([SIDE + step if place == position else SIDE for place in range(2)] for step in _MULTIPLES)
        fits = (step for step, (height, width) in zip(_MULTIPLES, sides, strict=True) if takes(height, width))
        if (step := next(fits, 1)) > 1:
            found[name] = step
    return found
