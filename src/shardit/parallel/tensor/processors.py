"""Cuts attention processors with weights of their own (IP-Adapter, custom diffusion) together with their attention.

They may exist before the model is cut, be added later, change, and be removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.modules.fingerprint import PROCESSOR
from shardit.core.placement.slices import Shards
from shardit.errors import UnsupportedError
from shardit.parallel.tensor.heads import is_linear, join
from shardit.parallel.tensor.load_state_dict import take_slices
from shardit.parallel.tensor.modules import install_role
from shardit.parallel.tensor.plan import Role, TensorPlan


def processor_parts(processor: nn.Module, query: Shards, keys: Shards) -> dict[str, Shards] | str:
    """Return the cut of each linear of a processor by name: that of the attention's linear with the same name. Norms
    are kept (over one head, or over the input). Returns a reason as text if another part has weights."""
    found: dict[str, Shards] = {}
    for name, module in processor.named_modules():
        if not module._parameters or any(step.startswith("norm") for step in name.split(".")):
            continue
        cut = keys if name.startswith(("to_k", "to_v")) else query
        if name.startswith("to_out") and is_linear(module) and module.in_features == query.total:
            found[name] = Shards(1, query.total, query.ranks)
        elif name.startswith(("to_q", "to_k", "to_v")) and is_linear(module) and module.out_features == cut.total:
            found[name] = cut
        else:
            return f"no rule matches {PROCESSOR}{'.' if name else ''}{name} of {type(processor).__name__}"
    return found


def attentions_in(model: nn.Module, units: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules in units of a plan that have a processor, by name."""
    inside = [(unit, name, m) for unit in units for name, m in model.get_submodule(unit).named_modules()]
    return {join(unit, name): module for unit, name, module in inside if hasattr(module, PROCESSOR)}


def mark_cut(attention: nn.Module) -> None:
    """Mark the present processor of an attention module as cut with it."""
    processor = getattr(attention, PROCESSOR)
    if isinstance(processor, nn.Module):
        vars(processor)["shardit_cut"] = True


def adopt_processors(attentions: Mapping[str, nn.Module], plan: TensorPlan, ranks: Collectives) -> None:
    """Cut processors that were added to cut attention, in place. Raises UnsupportedError if no rule matches."""
    for name, attention in attentions.items():
        processor = getattr(attention, PROCESSOR)
        query, keys = (plan.cuts.get(join(name, f"{part}.weight")) for part in ("to_q", "to_k"))
        if query is None or (isinstance(processor, nn.Module) and vars(processor).get("shardit_cut")):
            continue
        plan.forget(join(name, PROCESSOR))  # the previous processor
        if not isinstance(processor, nn.Module) or any(p.is_meta for p in processor.parameters()):
            continue
        parts = processor_parts(processor, query, keys or query)
        if isinstance(parts, str):
            raise UnsupportedError(
                f"{name} is cut over tensor ranks, and {parts}: set it before parallelize, or use "
                "tensor_parallel_size=1"
            )
        for part, cut in parts.items():
            _cut_linear(join(name, PROCESSOR, part), processor.get_submodule(part), cut, plan, ranks)
        vars(processor)["shardit_cut"] = True


def _cut_linear(name: str, linear: Any, cut: Shards, plan: TensorPlan, ranks: Collectives) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for leaf, whole in list(linear.named_parameters()):
            if cut.dim == 0 or leaf == "weight":
                plan.cuts[join(name, leaf)] = cut
                linear._parameters[leaf] = nn.Parameter(cut.of(ranks.index).take(whole), whole.requires_grad)
                take_slices(linear, {leaf: cut}, ranks.index)
    side = "in_features" if cut.dim == 1 else "out_features"
    plan.attributes[name] = {side: cut.lengths}
    setattr(linear, side, cut.lengths[ranks.index])
    if cut.dim == 1:
        plan.roles[name] = Role("rows", cut)
        install_role(linear, plan.roles[name], ranks, {})
