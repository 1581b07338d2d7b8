"""User overrides for the sharding of a model: `Plan`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Overrides for the sharding of a transformer. Nearly every model needs none."""

    order: tuple[str, ...] | None = None
    """Names of block lists (as in `named_modules`) in the order in which a forward runs them; omitted lists are not
    sharded. None: the order of registration. Error at load: unknown names."""
    replicate: tuple[str, ...] = ()
    """Names (or prefixes) of parameters inside blocks that code outside of the block reads; every rank keeps them."""
    overlap: bool = True
    """False runs calls over slices or sharded tokens one at a time, for a forward whose results change shape from call
    to call."""
