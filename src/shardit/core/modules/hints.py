"""User overrides for the sharding of a model: `Plan`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Overrides for the sharding of a transformer. Nearly every model needs none.

    order: names of the block lists (as in `named_modules`) in the order in which a forward runs them, if it differs
        from the order of registration; omitted lists are not sharded.
    replicate: names (or prefixes) of parameters inside blocks that code outside the block reads; every rank keeps them.
    overlap: False runs calls over slices or sharded tokens one at a time, for a forward whose results change shape
        from call to call.
    """

    order: tuple[str, ...] | None = None
    replicate: tuple[str, ...] = ()
    overlap: bool = True
