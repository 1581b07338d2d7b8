"""Tensor parallelism: the linears inside the blocks are cut over the ranks of the axis `tp`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.collectives import Collectives
from shardit.core.comm.mesh import Mesh
from shardit.core.modules.blocks import nbytes
from shardit.core.modules.hooks import add_libraries
from shardit.core.modules.patching import Subclasses, set_tensor, subclass_in_place
from shardit.core.placement.balance import WHOLE_SHARE, even_shares
from shardit.core.placement.roles import Roles
from shardit.core.placement.slices import Owned, Shards, Slice
from shardit.errors import UnsupportedError
from shardit.parallel.tensor.adapters import adapter_members, base_linears, cut_adapters, refuse_adapters
from shardit.parallel.tensor.check.units import watch_units
from shardit.parallel.tensor.load_state_dict import take_slices_of
from shardit.parallel.tensor.module_sizes import set_number
from shardit.parallel.tensor.modules import install_role
from shardit.parallel.tensor.norms import install_pair
from shardit.parallel.tensor.plan import TensorPlan
from shardit.parallel.tensor.planner import plan_tensors
from shardit.parallel.tensor.rules import Family

log = logging.getLogger(__name__)


def plan_components(
    modules: Mapping[str, nn.Module], roles: Roles, size: int, family: Family, members: int = 0
) -> dict[str, TensorPlan]:
    """Plan the cuts of components: those that are called in every step, and encoders; others are left whole. An encoder
    is also left whole if less than half of its linears can be cut (it would need most of its memory on every rank).

    members: number of ranks of a replica if the tensor axis is its only axis; a rank that owns a large VAE then gets
    less of the encoders. Raises UnsupportedError if a component that is called in every step has too few heads, or if
    adapters or hooks do not work on slices.
    """
    if size == 1:
        return {}
    shared = shared_modules(modules)
    split = roles.encoders - roles.whole.keys() - roles.stepped
    encoders = {n for n, m in modules.items() if n in split and _is_cut(m, size, family, shared)}
    wholes = [nbytes(m) for n, m in modules.items() if n not in roles.stepped | encoders]
    sliced = sum(nbytes(modules[n]) for n in encoders)
    share = sum(nbytes(module) for module in modules.values()) / size
    uneven = members == size and encoders and max(wholes, default=0) > WHOLE_SHARE * share
    parts = even_shares(wholes, sliced, size) if uneven else size
    plans = {}
    for name in (n for n in modules if n in roles.stepped | encoders):
        with base_linears(modules[name]):
            every_step = name in roles.stepped
            ways = size if every_step else parts
            plans[name] = plan_tensors(modules[name], ways, family, must_cut=every_step, kept=shared)
        refuse_uncuttable(name or type(modules[name]).__name__, modules[name], plans[name])
    return plans


def _is_cut(module: nn.Module, size: int, family: Family, shared: set[int]) -> bool:
    """Return whether an encoder has units to cut, and at least half of its linears can be cut."""
    with base_linears(module):
        plan = plan_tensors(module, size, family, kept=shared)
        sizes = {name: part.weight.numel() for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        cut = sum(number for name, number in sizes.items() if f"{name}.weight" in plan.cuts)
        return bool(plan.units) and 2 * cut >= sum(sizes.values())


def shared_modules(modules: Mapping[str, nn.Module]) -> set[int]:
    """Return the ids of modules that two components share: the other one may be whole, or run on one rank."""
    owners: dict[int, set[int]] = {}
    for component in {id(m): m for m in modules.values()}.values():
        for part in component.modules():
            owners.setdefault(id(part), set()).add(id(component))
    return {part for part, found in owners.items() if len(found) > 1}


def owners_of_wholes(config: DiffusionParallelConfig) -> int:
    """Return the `members` for `plan_components`: the ranks of a replica, or 0 if several ranks have the VAE."""
    return 0 if config.vae_patch_parallel_size > 1 else config.world_size // config.data_parallel_size


def owned_slices(owns: Callable[[str], bool], plan: TensorPlan | None, rank: int) -> Owned:
    """Return this tensor rank's slice of each parameter that its stage owns."""
    cuts: dict[str, Shards] = plan.cuts if plan is not None else {}

    def owned(name: str) -> bool | Slice:
        return owns(name) and (cuts[name].of(rank) if name in cuts else True)

    return owned


def describe_plan(name: str, module: nn.Module, plan: TensorPlan) -> list[str]:
    """Return notes on the plan of a component for the user: the share that stays whole, and unexpected whole
    modules."""
    return [f"{name}: {line}" for line in (whole_share(module, plan).sentence, *notes_together(plan.notes))]


MUCH = 0.05
"""Share of a component's parameters from which on it is a warning that they stay whole."""

MANY = 1 << 20
"""Fewest whole parameters for a warning: those of tiny models need no memory."""


class WholeShare(NamedTuple):
    """Whether much of a component stays whole on every rank, and a sentence with the share and the largest modules."""

    much: bool
    sentence: str


def whole_share(module: nn.Module, plan: TensorPlan) -> WholeShare:
    """Return what stays whole of a module, which may have whole parameters, slices or none of the data."""
    total, whole = 0, Counter[str]()
    for name, parameter in module.named_parameters():
        cut = plan.cuts.get(name)
        held = parameter.numel()
        total += held if cut is None else held // max(parameter.shape[cut.dim], 1) * cut.total
        if cut is None:
            whole[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] += held
    share = sum(whole.values()) / max(total, 1)
    much = share > MUCH and sum(whole.values()) >= MANY
    largest = ", ".join(name for name, _ in whole.most_common(8 if much else 3))
    sentence = f"{share:.1%} of its parameters are whole on every tensor rank ({largest}, ...)"
    return WholeShare(much, sentence)


def notes_together(notes: Iterable[str]) -> list[str]:
    """Merge notes that differ only in numbers within names."""
    alike: dict[str, list[str]] = {}
    for note in notes:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=[. ])", "*", note), []).append(note)
    more = {text: f" ({len(found)} of them)" if len(found) > 1 else "" for text, found in alike.items()}
    return [f"{text}{more[text]}" if more[text] else alike[text][0] for text in alike]


def shard_components(components: Mapping[str, Any], plans: Mapping[str, TensorPlan], mesh: Mesh) -> None:
    """Cut the components of a pipeline that have a plan, in place, and the adapters on them."""
    if plans:
        ranks = Collectives(mesh.axes["tp"])  # one for all, so that their bytes are counted together
        for name, plan in plans.items():
            title = name or type(components[name]).__name__
            if mesh.rank == 0:
                with base_linears(components[name]):
                    found = whole_share(components[name], plan)
                log.log(logging.WARNING if found.much else logging.INFO, "%s: %s", title, found.sentence)
                for note in notes_together(plan.notes):
                    log.warning("%s: %s", title, note)
            cut_model(components[name], plan, ranks, title)


def cut_model(model: nn.Module, plan: TensorPlan, ranks: Collectives, title: str) -> None:
    """Cut a model and the adapters on it, in place. title: its name in messages."""
    add_libraries(plan.family.libraries)
    refuse_uncuttable(title, model, plan)  # once more: `load` plans on a model without weights
    with base_linears(model):
        shard_tensors(model, plan, ranks)
    cut_adapters(model, plan, ranks)
    watch_units(title, model, plan, ranks)
    subclass_in_place(model, adapter_members(model, plan, ranks))


def refuse_uncuttable(title: str, model: nn.Module, plan: TensorPlan) -> None:
    """Raise UnsupportedError for adapters and hooks on linears that do not work on slices, while all is whole."""
    with base_linears(model):
        refuse_own_forwards(title, model, plan)
    refuse_adapters(model, plan)


def refuse_own_forwards(component: str, module: nn.Module, plan: TensorPlan) -> None:
    """Raise UnsupportedError if a hook has replaced the forward of a module that needs a summing forward: the hook
    would still call the old one."""
    for name in (*plan.roles, *(pair.key_linear for pair in plan.pairs)):
        if "forward" in vars(module.get_submodule(name)):
            raise UnsupportedError(
                f"{component}.{name} has a hook in place of its forward (layerwise casting, say): enable it after "
                "parallelize, or use tensor_parallel_size=1"
            )


def shard_tensors(module: nn.Module, plan: TensorPlan, ranks: Collectives) -> None:
    """Cut a module in place to this rank's slices; names and module tree stay.

    Whole parameters are cut, those that were loaded as slices are kept. `ranks` are those of the tensor axis.
    """
    cut: dict[int, nn.Parameter] = {}  # tied weights are cut once
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if name in plan.cuts:
            if id(parameter) not in cut:
                cut[id(parameter)] = _own_part(parameter, plan.cuts[name], ranks.index)
            set_tensor(module, name, cut[id(parameter)])
    for name, buffer in list(module.named_buffers()):
        if name in plan.cuts and buffer.shape[plan.cuts[name].dim] == plan.cuts[name].total:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = plan.cuts[name].of(ranks.index).take(buffer)
    for name, numbers in plan.attributes.items():
        part: Any = module.get_submodule(name)
        for attribute, values in numbers.items():
            set_number(part, attribute, values[ranks.index])
    made: Subclasses = {}
    for name, role in plan.roles.items():
        install_role(module.get_submodule(name), role, ranks, made)
    take_slices_of(module, plan, ranks.index)
    for pair in plan.pairs:
        query_norm, key_linear, key_norm = map(module.get_submodule, (pair.query_norm, pair.key_linear, pair.key_norm))
        roles = plan.roles[pair.query_norm], plan.roles[pair.key_norm]
        install_pair(query_norm, key_linear, key_norm, roles, ranks, made)


def _own_part(parameter: nn.Parameter, cut: Shards, rank: int) -> nn.Parameter:
    if parameter.shape[cut.dim] != cut.total:
        return parameter
    with torch.no_grad():
        return nn.Parameter(cut.of(rank).take(parameter), parameter.requires_grad)
