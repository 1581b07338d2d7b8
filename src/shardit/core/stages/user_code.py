"""Code and adapters of users inside a model, whose state may change between two of its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UserCode:
    """Whether there are any in one model, found before each call of it, or of its pipeline.

    runs: hooks or attention processors of users run in its forward. adapted: it has adapters, with scales of their own.
    """

    runs: bool = False
    adapted: bool = False

    @property
    def may_change(self) -> bool:
        """Whether a program may change, after a call, what the call reads: such as a variable of a hook."""
        return self.runs or self.adapted


def scales_adapters(kwargs: dict[str, Any], scales: str) -> bool:
    """Return whether a call asks for another strength of its adapters than they were given."""
    found = [value for name, value in kwargs.items() if scales and name.endswith(scales)]
    return any(isinstance(value, dict) and value.get("scale", 1.0) != 1.0 for value in found)
