"""Number of blocks of a model, derived from the names and shapes of its parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

SMALL_SHARE = 0.02
"""Block lists with a smaller share of the parameters are replicated on every rank."""


def count_blocks(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return the number of blocks that `find_blocks` finds in a model with parameters of these names and shapes; None
    if names are ambiguous: `ModuleList` and `Sequential` use the same names, and lists may contain lists."""
    sizes: dict[str, int] = defaultdict(int)
    elements: dict[str, set[int]] = defaultdict(set)
    nested, unclear = set(), set()
    for name, shape in shapes.items():
        parts = name.split(".")
        place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
        if place is None:
            continue
        prefix, rest = ".".join(parts[:place]), parts[place + 1 :]
        sizes[prefix] += math.prod(shape)
        elements[prefix].add(int(parts[place]))
        if len(rest) > 1:
            nested.add((prefix, parts[place]))
        if rest[:1] and rest[0].isdecimal():
            unclear.add(prefix)
    # Elements that hold all their parameters directly are plain layers, as in `Sequential`.
    unclear |= {prefix for prefix, found in elements.items() for one in found if (prefix, str(one)) not in nested}
    total = sum(math.prod(shape) for shape in shapes.values())
    lists = [prefix for prefix, size in sizes.items() if size >= SMALL_SHARE * total]
    if any(prefix in unclear or elements[prefix] != set(range(len(elements[prefix]))) for prefix in lists):
        return None
    return sum(len(elements[prefix]) for prefix in lists)
