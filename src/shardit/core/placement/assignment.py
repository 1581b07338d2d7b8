"""Who owns what of a whole pipeline: cut transformers, and components that one rank owns whole."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from shardit.config import DiffusionParallelConfig, check_layer_partition, partition_chunks, resolve_layer_partition
from shardit.core.comm.mesh import axis_sizes, coordinates
from shardit.core.modules.blocks import find_blocks, keeps, nbytes
from shardit.core.modules.hints import Plan
from shardit.core.modules.patching import plain_class
from shardit.core.modules.small_tensors import small_tensors
from shardit.core.modules.units import Unit, find_units
from shardit.core.placement.balance import WHOLE_SHARE, Loads, Relayed, distribute
from shardit.core.placement.partition import Placement, automatic_chunks, block_cost, place_blocks
from shardit.errors import UnsupportedError

CUT_PACKAGES = ("diffusers.models.transformers", "diffusers.models.unets")
"""Where the classes live that denoise, and so are cut; everything else of a pipeline runs once or twice a request."""

CUT_NAMES = ("transformer", "unet", "denoiser", "dit")
"""How the names of components begin that denoise, where their classes are a user's own or a pipeline's own."""

VAE_PACKAGE = "diffusers.models.autoencoders"
"""Where the classes of VAEs live."""

ENCODERS = "transformers."
"""Where the classes of text and image encoders live."""

LIBRARIES = ("builtins.", "abc.", "typing.", "torch.", "transformers.", "diffusers.", "huggingface_hub.")
"""Where the classes live that a component may have for bases and still be cut if it is no denoiser."""


def denoises(name: str, module: nn.Module) -> bool:
    """Whether a component is called in every step, and so is cut: one of diffusers' classes that denoise, or derived
    from one; or another class, by its name in the pipeline or because `_sp_plan` says how its tokens are split."""
    theirs = any(base.__module__.startswith(CUT_PACKAGES) for base in type(module).__mro__)
    own = not (is_vae(module) or type(module).__module__.startswith(ENCODERS))
    return theirs or getattr(module, "_sp_plan", None) is not None or (own and name.startswith(CUT_NAMES))


def is_vae(module: nn.Module) -> bool:
    """Whether a component is of one of diffusers' classes of VAEs, or derived from one."""
    return any(base.__module__.startswith(VAE_PACKAGE) for base in type(module).__mro__)


def encodes(module: nn.Module) -> bool:
    """Whether a component is of one of transformers' classes, or derived from one: an encoder, unless it `denoises`."""
    return any(base.__module__.startswith(ENCODERS) for base in type(module).__mro__) and not is_vae(module)


def own_code(module: nn.Module) -> type | None:
    """The class of a component, or one that it is derived from, that has methods and comes from no library: they may
    read any of its weights."""
    for cls in plain_class(module).__mro__:
        own = not f"{cls.__module__}.".startswith(LIBRARIES)
        if own and any(inspect.isroutine(value) or isinstance(value, property) for value in vars(cls).values()):
            return cls
    return None


@dataclass(frozen=True)
class Cut:
    """A transformer over the stages: its block names in execution order, their sizes in bytes, and where they go."""

    blocks: tuple[str, ...]
    placement: Placement
    plan: Plan | None = None


@dataclass(frozen=True)
class Assignment:
    """cut: transformers, by component name. relayed: encoders whose units several members own. owned: the member of a
    replica that owns a component whole, or for one that is sliced over the tensor axis the first of the `tp` neighbours
    that own it. tiles: the members that hold a VAE and share its tiles, its owner first. small: the tensors of owned
    components that every member has, by name. stages: the stage of each member of a replica (all ranks that work on the
    same requests). notes: what a user may want to know. held: about how many bytes each member has of a component."""

    stages: tuple[int, ...]
    cut: dict[str, Cut] = field(default_factory=dict)
    relayed: dict[str, Relayed] = field(default_factory=dict)
    owned: dict[str, int] = field(default_factory=dict)
    tiles: dict[str, tuple[int, ...]] = field(default_factory=dict)
    small: dict[str, frozenset[str]] = field(default_factory=dict)
    sliced: frozenset[str] = frozenset()
    tp: int = 1
    chunks: int = 1
    notes: tuple[str, ...] = ()
    held: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def owns(self, component: str, member: int) -> Callable[[str], bool]:
        """A predicate over parameter names of a component: does this member of a replica hold it?"""
        first = member - member % self.tp if component in self.sliced else member
        if component in self.owned:
            holders, small = self.tiles.get(component, (self.owned[component],)), self.small.get(component, ())
            return lambda name: first in holders or name in small
        if component in self.relayed:
            found = self.relayed[component]
            foreign = tuple(f"{u}." for u, owner in zip(found.units, found.owners, strict=True) if owner != first)
            return lambda name: not name.startswith(foreign)
        cut, stage = self.cut.get(component), self.stages[member]
        if cut is None:
            return lambda name: True
        others = {f"{b}." for b, owner in zip(cut.blocks, cut.placement.owners(), strict=True) if owner != stage}
        replicated = cut.plan.replicate if cut.plan else ()
        return lambda name: keeps(name, replicated) or not any(name.startswith(block) for block in others)

    def counted(self, modules: Mapping[str, nn.Module]) -> Assignment:
        """The same with `held`, counted on modules that are whole, so that it is the same on every rank: what is cut
        has other sizes on each, and tied weights of which a rank has nothing are tied no more."""
        held = {}
        for name, module in modules.items():
            sizes = {key: p.numel() * p.element_size() for key, p in module.named_parameters()}
            shares = self.tp if name in self.sliced else 1
            owned = (self.owns(name, member) for member in range(len(self.stages)))
            held[name] = tuple(sum(size for key, size in sizes.items() if owns(key)) / shares for owns in owned)
        return replace(self, held=held)

    def blocks(self, component: str, member: int) -> list[int]:
        """The numbers of the blocks of a component, or of the units of an encoder, that a member of a replica has."""
        owners, me = [], self.stages[member]
        if component in self.cut:
            owners = self.cut[component].placement.owners()
        elif component in self.relayed:
            owners = self.relayed[component].owners
            me = member - member % self.tp if component in self.sliced else member
        return [number for number, owner in enumerate(owners) if owner == me]


def branches(pipeline_class: type) -> int:
    """Micro-batches that one request of a pipeline can have in flight: 2 where it takes a negative prompt (guidance in
    two calls, or in one batched call that is split), else 1."""
    call = pipeline_class.forward if issubclass(pipeline_class, nn.Module) else pipeline_class.__call__
    return 2 if "negative_prompt" in inspect.signature(call).parameters else 1


def assign_blocks(
    model: nn.Module, config: DiffusionParallelConfig, in_flight: int, plan: Plan | None, environ: Mapping[str, str]
) -> tuple[Cut, str | None]:
    """Place the blocks of one transformer; the note says where fewer chunks were made than asked for.

    Raises InputError/UnsupportedError where partition, stages and blocks do not fit.
    """
    blocks = find_blocks(model, plan)
    pp_size, name = config.pipeline_parallel_size, type(model).__name__
    if not blocks and pp_size == 1:
        return Cut((), Placement((), 1), plan), None
    if not blocks:
        raise UnsupportedError(f"{name} has no block lists, so it cannot be cut; use pipeline_parallel_size=1")
    names = tuple(n for n, _ in blocks)
    partition, source = resolve_layer_partition(config, environ)
    if partition is not None:
        chunks = partition_chunks(config, partition, source)
        check_layer_partition(partition, source, len(blocks), pp_size, chunks)
        return Cut(names, Placement(tuple(partition), pp_size), plan), None
    wanted = config.pipeline_chunks or automatic_chunks(len(blocks), pp_size, in_flight)
    placement = place_blocks([block_cost(block) for _, block in blocks], pp_size, wanted)
    note = None
    if placement.chunks < wanted:
        note = f"{name}: {placement.chunks} chunks per rank instead of {wanted}, since it has {len(blocks)} blocks"
    return Cut(names, placement, plan), note


def assign(
    modules: Mapping[str, nn.Module],
    pipeline_class: type,
    config: DiffusionParallelConfig,
    *,
    max_in_flight: int = 1,
    plans: Plan | Mapping[str, Plan] | None = None,
    sliced: Iterable[str] = (),
    environ: Mapping[str, str],
    held: Sequence[float] | None = None,
) -> Assignment:
    """Decide, from shapes alone, which stage holds what of a pipeline; the same on every rank.

    Transformers are cut into blocks, large encoders into units; units and other components go where the fewest bytes
    are so far, or where they are among the `sliced` to the tensor neighbours with the fewest. A VAE whose tiles are
    shared goes to several ranks. `held`: bytes that each member has of components of the pipeline that are spread
    already, and are not among the modules.
    """
    pp_size = config.pipeline_parallel_size
    sizes = {**axis_sizes(config), "dp": 1}
    stages = tuple(coordinates(sizes, member)["pp"] for member in range(math.prod(sizes.values())))
    in_flight = max(1, branches(pipeline_class) // config.cfg_parallel_size) * max_in_flight
    notes, cut, load, parts = [], {}, list(held or [0.0] * len(stages)), frozenset(sliced)
    for name, module in ((name, module) for name, module in modules.items() if denoises(name, module)):
        plan = plans if isinstance(plans, Plan) or plans is None else plans.get(name)
        cut[name], note = assign_blocks(module, config, in_flight, plan, environ)
        notes += [note] if note else []
        shares = sizes["tp"] if name in parts else 1
        for (_, block), owner in zip(find_blocks(module, plan), cut[name].placement.owners(), strict=True):
            more = nbytes(block) // shares
            load = [size + (stage == owner) * more for size, stage in zip(load, stages, strict=True)]
    if pp_size > 1 and held is None and not any(nbytes(module) for module in modules.values()):
        raise UnsupportedError(f"{pipeline_class.__name__} has no weights to spread; use pipeline_parallel_size=1")
    loads = Loads(load, sizes["tp"])
    shares = config.vae_patch_parallel_size if held is None or any(map(is_vae, modules.values())) else 1
    tiles = _shared_tiles(modules, pipeline_class.__name__, shares, loads)
    notes += [f"{name}: its tiles are shared by {len(members)} ranks" for name, members in tiles.items()]
    rest = {name: module for name, module in modules.items() if name not in cut and name not in tiles}
    wholes, encoders = _outside_transformers(rest, modules, loads, parts)
    notes += [f"{name} is whole on one rank: {why}" for name in wholes if (why := left_whole(modules[name]))]
    owned, relayed = distribute(loads, wholes, encoders, parts)
    owned.update((name, members[0]) for name, members in tiles.items())
    chunks = max((c.placement.chunks for c in cut.values()), default=1)
    if pp_size > 1:
        how = "contiguous" if chunks == 1 else "looped"
        notes.insert(0, f"{how} placement: up to {in_flight} micro-batches in flight")
    # transformers loads a model whole or not at all, so what is read of an encoder comes from its owner.
    small = {name: small_tensors(modules[name]) for name in owned if not encodes(modules[name])}
    return Assignment(stages, cut, relayed, owned, tiles, small, parts, sizes["tp"], chunks, tuple(notes))


def left_whole(module: nn.Module) -> str | None:
    """Why an encoder is not cut, whatever its size."""
    cls = own_code(module) if encodes(module) else None
    return f"{cls.__name__} has methods of its own, which may read any of its weights" if cls else None


def _outside_transformers(
    rest: Mapping[str, nn.Module], modules: Mapping[str, nn.Module], loads: Loads, sliced: frozenset[str]
) -> tuple[dict[str, float], dict[str, list[Unit]]]:
    """Bytes of the components that one rank is to own whole, and the units of those that are to be cut."""
    share = sum(nbytes(module) for module in modules.values()) / len(loads.bytes)
    wholes: dict[str, float] = {}
    encoders: dict[str, list[Unit]] = {}
    for name, module in rest.items():
        size, places = nbytes(module), len(loads.bytes) // (loads.tp if name in sliced else 1)
        if encodes(module) and not own_code(module) and places > 1 and size > WHOLE_SHARE * share:
            units = find_units(module)
            if len(units) > 1:
                encoders[name] = units
                continue
        wholes[name] = size
    return wholes, encoders


def _shared_tiles(
    modules: Mapping[str, nn.Module], pipeline: str, shares: int, loads: Loads
) -> dict[str, tuple[int, ...]]:
    """The members that hold each VAE whose tiles are to be shared: those with the fewest bytes."""
    tiles = {}
    for name in tiled_components(modules, pipeline) if shares > 1 else ():
        tiles[name] = tuple(sorted(range(len(loads.bytes)), key=lambda m: (loads.bytes[m], m))[:shares])
        for member in tiles[name]:
            loads.put(nbytes(modules[name]), member, 1)
    return tiles


def tiled_components(modules: Mapping[str, nn.Module], pipeline: str) -> tuple[str, ...]:
    """The VAEs of a pipeline that can work tile by tile. Raises UnsupportedError where none can."""
    kinds = {name: type(module) for name, module in modules.items() if is_vae(module)}
    tiled = tuple(name for name, kind in kinds.items() if any("tiled_decode" in method for method in dir(kind)))
    if not tiled:
        names = " and ".join(sorted(kind.__name__ for kind in kinds.values()))
        without = f"{pipeline} has no VAE of diffusers' classes"
        reason = f"{names} of {pipeline} cannot decode in tiles" if names else without
        raise UnsupportedError(f"{reason}; use vae_patch_parallel_size=1")
    return tiled
