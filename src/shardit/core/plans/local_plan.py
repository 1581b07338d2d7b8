"""Selects the part of a call's plan that concerns one rank, indexed by call site."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardit.core.plans.call_plan import Address, CallPlan, Hop, Leaf
from shardit.core.plans.stand_ins import is_float


@dataclass
class LocalPlan:
    """The work of one rank for a `CallPlan`, indexed by call site.

    keep_args, keep_outs: leaves whose tensors are remembered, for a hop. fresh: output storages of unowned sites that
    lie in the message of a hop. last_of: segment that ends at a site. pauses: sites at whose exit a hop is awaited.
    places: (hop, item) put in place at the exit of a site. copies: those copied there, to be sent later. stops: sites
    with work at their exit. release: storages that no later hop needs. integers: (offset, size) of the parts of a hop's
    message that code may index with before it arrives.
    """

    plan: CallPlan
    rank: int
    keep_args: dict[int, list[int]] = field(default_factory=dict)
    keep_outs: dict[int, list[int]] = field(default_factory=dict)
    fresh: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)
    last_of: dict[int, int] = field(default_factory=dict)
    last_own: int = -1
    pauses: set[int] = field(default_factory=set)
    places: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    copies: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    stops: set[int] = field(default_factory=set)
    release: dict[int, list[Address]] = field(default_factory=dict)
    integers: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    needs_args: set[int] = field(default_factory=set)
    checked: set[int] = field(default_factory=set)

    @staticmethod
    def of(plan: CallPlan, rank: int) -> LocalPlan:
        """Select the part of a plan that concerns `rank`."""
        local = LocalPlan(plan, rank)
        local.last_of = {last: k for k, (_, last) in enumerate(plan.segments)}
        local.last_own = max((k for k, owner in enumerate(plan.owners) if owner == rank), default=-1)
        last_use: dict[Address, int] = {}
        for k, hop in enumerate(plan.hops):
            if rank in (hop.source, hop.target):
                last_use.update((item.address, k) for item in hop.items)
                local._add(k, hop)
        for address, k in last_use.items():
            local.release.setdefault(k, []).append(address)
        for n, site in enumerate(plan.sites):
            if n in local.keep_args or (site.owner != rank and any(leaf.kind == "arg" for leaf in site.leaves)):
                local.needs_args.add(n)
            storages = [leaf.storage for leaf in site.leaves if leaf.kind == "tensor"]
            aliases = len(storages) != len(set(storages)) or any(leaf.kind != "tensor" for leaf in site.leaves)
            if n in local.last_of or n in local.keep_outs or aliases:
                local.checked.add(n)
        local.stops = {*local.last_of, *local.pauses, *local.places, *local.copies}
        return local

    def _add(self, k: int, hop: Hop) -> None:
        for i, item in enumerate(hop.items):
            address = item.address
            keep = self.keep_args if address.kind == "arg" else self.keep_outs
            keep.setdefault(address.site, []).append(address.leaf)
            if hop.source == self.rank:
                if item.taken < self.plan.segments[k][1]:
                    self.copies.setdefault(item.taken, []).append((k, i))
            elif item.fresh:
                leaf = self.plan.sites[address.site].leaves[address.leaf]
                if not is_float(leaf):
                    self.integers.setdefault(k, []).append(hop.layout.parts[i])
                self.fresh[(address.site, leaf.storage)] = (k, i, item.start + leaf.offset * _width(leaf))
            else:
                self.places.setdefault(item.placed, []).append((k, i))
        if hop.target == self.rank:
            self.pauses.add(hop.pause)


def _width(leaf: Leaf) -> int:
    assert leaf.dtype is not None
    return leaf.dtype.itemsize
