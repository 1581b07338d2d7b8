"""Assigns the parts of a pipeline to ranks: cut transformers, and components that one rank owns whole."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from shardit.config import DiffusionParallelConfig, fitting_partition, idle_chunks
from shardit.core.comm.mesh import axis_sizes, coordinates
from shardit.core.modules.blocks import find_blocks, keeps, nbytes
from shardit.core.modules.hints import Plan
from shardit.core.modules.small_tensors import small_tensors
from shardit.core.modules.units import Unit, find_units
from shardit.core.placement.balance import WHOLE_SHARE, LayerOwners, Loads, distribute
from shardit.core.placement.partition import ChunkPlacement, automatic_chunks, block_cost, place_blocks
from shardit.core.placement.roles import Roles
from shardit.errors import UnsupportedError


@dataclass(frozen=True)
class Cut:
    """A transformer over the stages: its block names in execution order, and their placement."""

    blocks: tuple[str, ...]
    placement: ChunkPlacement
    plan: Plan | None = None


@dataclass(frozen=True)
class Assignment:
    """cut: transformers, by component name. layerwise: encoders whose units several members own. owned: the member of a
    replica that owns a component whole, or for one that is sliced over the tensor axis the first of the `tp` neighbours
    that own it. tiles: the members that have a VAE and share its tiles, its owner first. small: the tensors of owned
    components that every member has, by name. stages: the stage of each member of a replica (all ranks that work on the
    same requests). unmet: requested settings that cannot be followed. notes: these, and other notes for the user. held:
    approximate bytes of each member for a component."""

    stages: tuple[int, ...]
    cut: dict[str, Cut] = field(default_factory=dict)
    layerwise: dict[str, LayerOwners] = field(default_factory=dict)
    owned: dict[str, int] = field(default_factory=dict)
    tiles: dict[str, tuple[int, ...]] = field(default_factory=dict)
    small: dict[str, frozenset[str]] = field(default_factory=dict)
    sliced: frozenset[str] = frozenset()
    tp: int = 1
    chunks: int = 1
    unmet: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    held: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def owns(self, component: str, member: int) -> Callable[[str], bool]:
        """Return a predicate over parameter names of a component: whether this member of a replica has it."""
        first = member - member % self.tp if component in self.sliced else member
        if component in self.owned:
            holders, small = self.tiles.get(component, (self.owned[component],)), self.small.get(component, ())
            return lambda name: first in holders or name in small
        if component in self.layerwise:
            found = self.layerwise[component]
            foreign = tuple(f"{u}." for u, owner in zip(found.units, found.owners, strict=True) if owner != first)
            return lambda name: not name.startswith(foreign)
        cut, stage = self.cut.get(component), self.stages[member]
        if cut is None:
            return lambda name: True
        others = {f"{b}." for b, owner in zip(cut.blocks, cut.placement.owners(), strict=True) if owner != stage}
        replicated = cut.plan.replicate if cut.plan else ()
        return lambda name: keeps(name, replicated) or not any(name.startswith(block) for block in others)

    def counted(self, modules: Mapping[str, nn.Module]) -> Assignment:
        """Return the same assignment with `held`, counted on whole modules, so that it is the same on every rank: cut
        parts have other sizes on each, and tied weights that are absent on a rank are no longer tied."""
        held = {}
        for name, module in modules.items():
            sizes = {key: p.numel() * p.element_size() for key, p in module.named_parameters()}
            shares = self.tp if name in self.sliced else 1
            owned = (self.owns(name, member) for member in range(len(self.stages)))
            held[name] = tuple(sum(size for key, size in sizes.items() if owns(key)) / shares for owns in owned)
        return replace(self, held=held)

    def blocks(self, component: str, member: int) -> list[int]:
        """Return the numbers of the blocks of a component, or of the units of an encoder, of a member of a replica."""
        owners, me = [], self.stages[member]
        if component in self.cut:
            owners = self.cut[component].placement.owners()
        elif component in self.layerwise:
            owners = self.layerwise[component].owners
            me = member - member % self.tp if component in self.sliced else member
        return [number for number, owner in enumerate(owners) if owner == me]


def assign_blocks(
    model: nn.Module, config: DiffusionParallelConfig, in_flight: int, plan: Plan | None, environ: Mapping[str, str]
) -> tuple[Cut, str | None]:
    """Place the blocks of one transformer; a note reports requested chunks that were not made.

    Raises InputError/UnsupportedError if partition, stages and blocks do not fit.
    """
    blocks = find_blocks(model, plan)
    pp_size, name = config.pipeline_parallel_size, type(model).__name__
    if not blocks and pp_size == 1:
        return Cut((), ChunkPlacement((), 1), plan), idle_chunks(config)
    if not blocks:
        raise UnsupportedError(f"{name} has no block lists, so it cannot be cut; use pipeline_parallel_size=1")
    names = tuple(n for n, _ in blocks)
    partition = fitting_partition(config, environ, len(blocks))
    if partition is None and pp_size == 1:
        return Cut(names, ChunkPlacement((len(names),), 1), plan), idle_chunks(config)
    if partition is not None:
        return Cut(names, ChunkPlacement(tuple(partition), pp_size), plan), idle_chunks(config)
    wanted = config.pipeline_chunks or automatic_chunks(len(blocks), pp_size, in_flight)
    placement = place_blocks([block_cost(block) for _, block in blocks], pp_size, wanted)
    note = None
    if placement.chunks < wanted:
        note = f"{name}: {placement.chunks} chunks per rank instead of {wanted}, since it has {len(blocks)} blocks"
    return Cut(names, placement, plan), note


def assign(
    modules: Mapping[str, nn.Module],
    roles: Roles,
    config: DiffusionParallelConfig,
    *,
    max_in_flight: int = 1,
    plans: Plan | Mapping[str, Plan] | None = None,
    sliced: Iterable[str] = (),
    environ: Mapping[str, str],
    held: Sequence[float] | None = None,
) -> Assignment:
    """Assign the parts of a pipeline to stages, from shapes alone; the same on every rank.

    Transformers are cut into blocks, large encoders into units; units and other components go to the member with the
    fewest bytes so far, or if they are among the `sliced` to the tensor neighbours with the fewest. A VAE with shared
    tiles goes to several ranks. `held`: bytes of each member for components of the pipeline that are sharded already,
    and are not among the modules.
    """
    pp_size = config.pipeline_parallel_size
    sizes = {**axis_sizes(config), "dp": 1}
    stages = tuple(coordinates(sizes, member)["pp"] for member in range(math.prod(sizes.values())))
    in_flight = max(1, roles.branches // config.cfg_parallel_size) * max_in_flight
    unmet, cut, load, parts = [], {}, list(held or [0.0] * len(stages)), frozenset(sliced)
    for name, module in ((n, m) for n, m in modules.items() if n in roles.stepped):
        plan = plans if isinstance(plans, Plan) or plans is None else plans.get(name)
        cut[name], note = assign_blocks(module, config, in_flight, plan, environ)
        unmet += [note] if note and note not in unmet else []
        of_stage = _bytes_of_stages(module, cut[name], sizes["tp"] if name in parts else 1)
        load = [size + of_stage[stage] for size, stage in zip(load, stages, strict=True)]
    if pp_size > 1 and held is None and not any(nbytes(module) for module in modules.values()):
        raise UnsupportedError(f"{roles.title} has no weights to shard; use pipeline_parallel_size=1")
    loads = Loads(load, sizes["tp"])
    shares = config.vae_patch_parallel_size if held is None or roles.vaes else 1
    tiles = _shared_tiles(modules, roles, shares, loads)
    notes = [*unmet, *(f"{name}: its tiles are shared by {len(members)} ranks" for name, members in tiles.items())]
    rest = {name: module for name, module in modules.items() if name not in cut and name not in tiles}
    share = sum(nbytes(module) for module in modules.values()) / len(stages)
    wholes, encoders = _outside_transformers(rest, roles, share, loads, parts)
    notes += [f"{name} is whole on one rank: {roles.whole[name]}" for name in wholes if name in roles.whole]
    owned, layerwise = distribute(loads, wholes, encoders, parts)
    owned.update((name, members[0]) for name, members in tiles.items())
    chunks = max((c.placement.chunks for c in cut.values()), default=1)
    if pp_size > 1:
        how = "contiguous" if chunks == 1 else "looped"
        notes.insert(0, f"{how} placement: up to {in_flight} micro-batches in flight")
    # Encoders are loaded whole or not at all, so reads of one are served by its owner.
    small = {name: small_tensors(modules[name]) for name in owned if name not in roles.encoders}
    return Assignment(
        stages, cut, layerwise, owned, tiles, small, parts, sizes["tp"], chunks, tuple(unmet), tuple(notes)
    )


def _bytes_of_stages(module: nn.Module, cut: Cut, shares: int) -> dict[int, int]:
    """Return the bytes of the blocks of each stage, if each linear is split into so many shares."""
    found: dict[int, int] = defaultdict(int)
    for (_, block), owner in zip(find_blocks(module, cut.plan), cut.placement.owners(), strict=True):
        found[owner] += nbytes(block) // shares
    return found


def _outside_transformers(
    rest: Mapping[str, nn.Module], roles: Roles, share: float, loads: Loads, sliced: frozenset[str]
) -> tuple[dict[str, float], dict[str, list[Unit]]]:
    """Return the bytes of the components that one rank will own whole, and the units of those that will be cut because
    they have more than WHOLE_SHARE of a rank's `share` of all bytes."""
    wholes: dict[str, float] = {}
    encoders: dict[str, list[Unit]] = {}
    for name, module in rest.items():
        size, places = nbytes(module), len(loads.bytes) // (loads.tp if name in sliced else 1)
        splits = name in roles.encoders and name not in roles.whole
        if splits and places > 1 and size > WHOLE_SHARE * share:
            units = find_units(module)
            if len(units) > 1:
                encoders[name] = units
                continue
        wholes[name] = size
    return wholes, encoders


def _shared_tiles(
    modules: Mapping[str, nn.Module], roles: Roles, shares: int, loads: Loads
) -> dict[str, tuple[int, ...]]:
    """Return the members for each VAE with shared tiles: those with the fewest bytes. Raises UnsupportedError if no VAE
    works tile by tile."""
    if shares > 1 and not roles.tiled:
        raise UnsupportedError(f"{roles.no_tiles}; use vae_patch_parallel_size=1")
    tiles = {}
    for name in roles.tiled if shares > 1 else ():
        tiles[name] = tuple(sorted(range(len(loads.bytes)), key=lambda m: (loads.bytes[m], m))[:shares])
        for member in tiles[name]:
            loads.put(nbytes(modules[name]), member, 1)
    return tiles
