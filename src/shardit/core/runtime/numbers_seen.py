"""Numbers among the arguments of calls, which may be switches or change from step to step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MOST = 8
"""Different numbers of one model that count as kinds of calls. After these they are taken for what changes with every
step, such as a time."""


class NumbersSeen:
    """The numbers of a model's calls. The same on every rank, as the calls are."""

    def __init__(self) -> None:
        self._seen: set[tuple[float, ...]] = set()

    def kind(self, numbers: Iterable[float]) -> tuple[float, ...] | None:
        """Return the part of a call's kind that its numbers decide: the numbers themselves; None for those of later
        calls, once MOST have been seen."""
        found = tuple(numbers)
        if found not in self._seen:
            if len(self._seen) >= MOST:
                return None
            self._seen.add(found)
        return found


def floats_in(leaves: Iterable[Any]) -> list[float]:
    """Return the floats among leaves."""
    return [leaf for leaf in leaves if type(leaf) is float]
