"""Selects the part of a call's plan that concerns one rank, indexed by call site."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardit.core.plans.call_plan import Address, CallPlan, Hop, Leaf, Site, span_bytes
from shardit.core.plans.stand_ins import is_float


@dataclass(frozen=True)
class SiteWork:
    """The work of one rank at one call site, decided once so that each call of a block takes little Python.

    own: whether this rank runs the block. flatten: whether arguments are looked at before it; aliases: whether its
    outputs may share their memory. checked: whether its outputs are looked at. single: the only output, of which no hop
    reads or fills the memory. stop: whether there is work at the exit.
    """

    site: Site
    own: bool
    flatten: bool
    aliases: bool
    checked: bool
    single: Leaf | None
    stop: bool


@dataclass
class LocalPlan:
    """The work of one rank for a `CallPlan`, indexed by call site.

    keep_args, keep_outs: leaves whose tensors are remembered, for a hop. fresh: output storages of unowned sites that
    lie in the message of a hop. last_of: segment that ends at a site. pauses: sites at whose exit a hop is awaited.
    places: (hop, item) put in place at the exit of a site. copies: those copied there, to be sent later. work: that
    at each site. release: storages that no later hop needs. integers: (offset, size) of the parts of a hop's
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
    work: list[SiteWork] = field(default_factory=list)
    release: dict[int, list[Address]] = field(default_factory=dict)
    integers: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

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
        local.work = [local._work_at(n, site) for n, site in enumerate(plan.sites)]
        return local

    def _work_at(self, n: int, site: Site) -> SiteWork:
        own, kept = site.owner == self.rank, n in self.keep_outs
        shared = any(leaf.kind == "arg" for leaf in site.leaves)
        storages = [leaf.storage for leaf in site.leaves if leaf.kind == "tensor"]
        aliases = len(storages) != len(set(storages)) or any(leaf.kind != "tensor" for leaf in site.leaves)
        single = None if own or kept or not site.spec.is_leaf() else whole_storage(site.leaves[0])
        return SiteWork(
            site,
            own,
            flatten=n in self.keep_args or (not own and shared),
            aliases=shared,
            checked=kept or aliases or n in self.last_of,
            single=single,
            stop=any(n in known for known in (self.last_of, self.pauses, self.places, self.copies)),
        )

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


def whole_storage(leaf: Leaf) -> Leaf | None:
    """Return a leaf if it is a new tensor that fills its storage."""
    return leaf if leaf.kind == "tensor" and leaf.offset == 0 and leaf.nbytes == span_bytes(leaf) else None


def _width(leaf: Leaf) -> int:
    assert leaf.dtype is not None
    return leaf.dtype.itemsize
