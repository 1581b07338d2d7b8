"""Makes a cut module whole again, for one call or permanently: its slices are gathered from the tensor ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.placement.gathered import gathered
from shardit.core.placement.slices import Shards, one_behind_the_other
from shardit.core.runtime.yielding import without_yielding
from shardit.parallel.tensor.heads import join
from shardit.parallel.tensor.module_sizes import number_at, set_number
from shardit.parallel.tensor.plan import PLAIN, WHOLE, TensorPlan

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""Linears made by diffusers' `fuse_projections`, and their parts."""


@contextmanager
def temporarily_whole(model: nn.Module, unit: str, plan: TensorPlan, ranks: Collectives) -> Iterator[None]:
    """Temporarily give a module below `model` whole weights and its own code everywhere. Collective; no other call gets
    a turn, since modules are shared between calls in flight."""
    undo: list[Callable[[], None]] = []
    with without_yielding():
        try:
            _make_whole(model, unit, plan, ranks, undo)
            yield
        finally:
            for act in reversed(undo):
                act()


def make_whole(model: nn.Module, unit: str, plan: TensorPlan, ranks: Collectives) -> None:
    """Make a module below `model` whole on every rank, in place, and remove it from the plan. Collective."""
    with without_yielding(), torch.inference_mode(False), torch.no_grad():
        _make_whole(model, unit, plan, ranks, [])
    plan.forget(unit)


def _make_whole(
    model: nn.Module, unit: str, plan: TensorPlan, ranks: Collectives, undo: list[Callable[[], None]]
) -> None:
    inside = f"{unit}." if unit else ""
    for module, leaf, cut in [*_slices(model, inside, plan, ranks.index), *_fused(model, unit, plan)]:
        tensors: dict[str, Any] = module._buffers if leaf in module._buffers else module._parameters
        part, whole = tensors[leaf], gathered(tensors[leaf].detach(), cut, ranks)
        tensors[leaf] = nn.Parameter(whole, part.requires_grad) if isinstance(part, nn.Parameter) else whole
        undo.append(lambda tensors=tensors, leaf=leaf, part=part: tensors.__setitem__(leaf, part))
    for module in {id(m): m for _, m in model.get_submodule(unit).named_modules()}.values():
        cls = plain = type(module)
        while (made := next((one for one in plain.__mro__ if PLAIN in vars(one)), None)) is not None:
            plain = vars(made)[PLAIN]
        if plain is not cls:
            module.__class__ = plain
            undo.append(lambda module=module, cls=cls: setattr(module, "__class__", cls))
            vars(module)[WHOLE] = True
            undo.append(lambda module=module: vars(module).pop(WHOLE, None))
    for name, numbers in plan.attributes.items():
        if f"{name}.".startswith(inside):
            module = model.get_submodule(name)
            for attribute, values in numbers.items():
                total = plan.totals.get((name, attribute), sum(values))
                _set(getattr(module, "base_layer", module), attribute, total, undo)


def _set(module: Any, attribute: str, value: int, undo: list[Callable[[], None]]) -> None:
    before = number_at(module, attribute)
    set_number(module, attribute, value)
    undo.append(lambda: set_number(module, attribute, before))


def _slices(model: nn.Module, inside: str, plan: TensorPlan, rank: int) -> Iterator[tuple[nn.Module, str, Shards]]:
    """Yield the parameters and buffers inside a module that are slices, including those of adapters: module, name in
    it, and cut."""
    for name, cut in plan.cuts.items():
        if not name.startswith(inside):
            continue
        owner, _, leaf = name.rpartition(".")
        module: Any = part_at(model, owner)
        if module is None:
            continue
        for holder, key in ((getattr(module, "base_layer", module), leaf), *_of_adapters(module, leaf, cut)):
            found = holder._parameters.get(key, holder._buffers.get(key))
            # A rank may have all, while others have copies of a part.
            if found is not None and found.shape[cut.dim] == cut.lengths[rank] and not cut.everywhere:
                yield holder, key, cut


def cuts_by_name(model: nn.Module, plan: TensorPlan, rank: int) -> dict[str, Shards]:
    """Return the cuts of the parameters and buffers of a cut model, including those of adapters, by each of their names
    in it."""
    cuts = {(id(module), leaf): cut for module, leaf, cut in _slices(model, "", plan, rank)}
    return {
        join(name, leaf): cuts[id(module), leaf]
        for name, module in model.named_modules(remove_duplicate=False)
        for leaf in (*module._parameters, *module._buffers)
        if (id(module), leaf) in cuts
    }


def _fused(model: nn.Module, unit: str, plan: TensorPlan) -> Iterator[tuple[nn.Module, str, Shards]]:
    """Do the same for linears that were fused after the cut: they contain the slices of their parts in sequence."""
    for name, module in model.get_submodule(unit).named_modules():
        above, _, last = join(unit, name).rpartition(".")
        whole = fused_cut(plan, above, last)
        if whole is None:
            continue
        for leaf, found in module._parameters.items():
            if found is not None and found.shape[0] != whole.total:
                yield module, leaf, whole


def fused_cut(plan: TensorPlan, above: str, last: str) -> Shards | None:
    """Return the cut of a fused linear with the name `last` in the module `above`; None if its parts are not cut."""
    cuts = [plan.cuts.get(join(above, f"{part}.weight")) for part in FUSED.get(last, ())]
    parts = [cut for cut in cuts if cut is not None]
    if not parts or len(parts) < len(cuts):
        return None
    return one_behind_the_other(*parts)


def _of_adapters(layer: Any, leaf: str, cut: Shards) -> Iterator[tuple[nn.Module, str]]:
    if leaf != "weight" or not hasattr(layer, "lora_A"):
        return
    for adapter in layer.lora_A:
        if cut.dim == 1:
            yield layer.lora_A[adapter], "weight"
        else:
            yield from ((layer.lora_B[adapter], key) for key in layer.lora_B[adapter]._parameters)


def part_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a path, or None: processors and adapters come and go."""
    for name in path.split(".") if path else ():
        found = model._modules.get(name)
        if found is None:
            return None
        model = found
    return model
