"""Random choices that follow from texts and numbers alone, in any version of Python and torch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SEEDS = 2**63
"""Number of seeds."""


def derived(*parts: object) -> int:
    """Return a seed from 0 to SEEDS - 1 that follows from texts and numbers."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def mixed(values: Sequence[T], draw: random.Random) -> list[T]:
    """Return values in a random order. By sorting: Python promises the same numbers of random() in all versions, but
    not the same shuffle()."""
    return [value for _, _, value in sorted((draw.random(), place, value) for place, value in enumerate(values))]
