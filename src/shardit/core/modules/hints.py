"""Overrides that a user may give about a model: `Plan`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Overrides of what is found in a transformer. Nearly every model needs none.

    order: names of the block lists (as in `named_modules`) in the order in which a forward runs them, where that is not
        the order in which they are registered; lists left out are not cut.
    replicate: names (or prefixes) of parameters inside blocks that code outside the block reads; every rank keeps them.
    overlap: False lets calls over slices or sharded tokens run one after the other: for a forward whose results change
        their shape from call to call.
    """

    order: tuple[str, ...] | None = None
    replicate: tuple[str, ...] = ()
    overlap: bool = True
