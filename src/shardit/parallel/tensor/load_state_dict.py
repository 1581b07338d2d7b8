"""`load_state_dict` on cut modules: the caller passes whole weights, and each rank takes its slice.

A hook of the module with the parameter does it, so a call on any module above it works, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.core.placement.slices import Shards
from shardit.parallel.tensor.gather_module import FUSED, fused_cut, part_at
from shardit.parallel.tensor.heads import join, owner_of
from shardit.parallel.tensor.plan import TensorPlan

LOADS = "_shardit_loads"
"""Attribute of a cut module."""


@dataclass(frozen=True)
class TakeSlices:
    """The hook. cuts: by the name of a parameter below the module. Values of the size of a slice are left unchanged."""

    cuts: Mapping[str, Shards]
    rank: int

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        vars(module)[LOADS] = loads_of(module) + 1
        for name, cut in self.cuts.items():
            given, held = state_dict.get(prefix + name), _parameter(module, name)
            if not isinstance(given, torch.Tensor) or held is None or given.ndim != held.ndim:
                continue
            if given.shape[cut.dim] == cut.total != held.shape[cut.dim]:
                state_dict[prefix + name] = cut.of(self.rank).take(given)


def loads_of(module: nn.Module) -> int:
    """Return how often a cut module has loaded weights."""
    return vars(module).get(LOADS, 0)


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the stored parameter, without the interceptors of reads by outside code."""
    holder = part_at(module, owner_of(name))
    return holder._parameters.get(name.rpartition(".")[2]) if holder is not None else None


def take_slices(module: nn.Module, cuts: Mapping[str, Shards], rank: int) -> None:
    """Make loads into a module take slices of whole values, in place. Does nothing the second time."""
    hook = TakeSlices(dict(cuts), rank)
    if not any(known == hook for known in _hooks(module)):
        module.register_load_state_dict_pre_hook(hook)


def takes_slices(module: nn.Module) -> bool:
    """Return whether a module was made whole and then cut."""
    return any(isinstance(known, TakeSlices) for known in _hooks(module))


def _hooks(module: nn.Module) -> list[Any]:
    return [getattr(known, "hook", None) for known in module._load_state_dict_pre_hooks.values()]


def take_slices_of(model: nn.Module, plan: TensorPlan, rank: int) -> None:
    """Do the same for all modules that a plan cuts, and for linears that are fused from several of them later."""
    for name, module in model.named_modules(remove_duplicate=False):
        own = {leaf: plan.cuts[join(name, leaf)] for leaf in module._parameters if join(name, leaf) in plan.cuts}
        fused = {last: fused_cut(plan, name, last) for last in FUSED}
        own |= {f"{last}.{leaf}": cut for last, cut in fused.items() if cut for leaf in ("weight", "bias")}
        if own:
            take_slices(module, own, rank)
