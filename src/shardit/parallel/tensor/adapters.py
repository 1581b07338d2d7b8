"""LoRA on linears that are cut: its matrices are cut like the linear, and one sum or gather serves both.

Adapters are loaded whole and then cut, so that diffusers itself reads every format that it supports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.modules.patching import subclass_in_place
from shardit.core.placement.slices import Shards, Slice
from shardit.core.runtime.digests import named
from shardit.errors import UnsupportedError, first_line
from shardit.parallel.tensor.forward import unless_whole
from shardit.parallel.tensor.load_state_dict import take_slices, takes_slices
from shardit.parallel.tensor.modules import FINISH, unfinished
from shardit.parallel.tensor.plan import PLAIN, TensorPlan

ONE_RANK = "or use tensor_parallel_size=1"


@contextmanager
def base_linears(model: nn.Module) -> Iterator[None]:
    """Temporarily replace adapter layers in the module tree by the linears inside them."""
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_layer(module)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def refuse_adapters(model: nn.Module, plan: TensorPlan) -> None:
    """Raise UnsupportedError for other kinds of adapters than LoRA on linears that are cut, or will be."""
    for name, module, _ in _adapted(model, plan):
        role = plan.roles.get(name)
        if not _is_lora(module) or (role is not None and role.kind not in FINISH):
            raise UnsupportedError(
                f"{name} is cut over tensor ranks, and its {type(module).__name__} adapter is not plain LoRA: merge it "
                f"into the weights before parallelize ({plan.family.merging}), {ONE_RANK}"
            )


def cut_adapters(model: nn.Module, plan: TensorPlan, ranks: Collectives) -> None:
    """Cut the adapters of a cut model in place, except those that are cut already. Raises as `refuse_adapters`."""
    refuse_adapters(model, plan)
    for name, module, cut in _adapted(model, plan):
        role = plan.roles.get(name)
        for adapter in module.lora_A:
            _cut_pair(module.lora_A[adapter], module.lora_B[adapter], cut, ranks.index)
            if cut.dim == 1:
                _drop_own_part(module.lora_dropout[adapter], cut, ranks.index)
        if role is not None and "_finishes" not in vars(type(module)):
            _finish_once(module, FINISH[role.kind](role, ranks))


def _adapted(model: nn.Module, plan: TensorPlan) -> list[tuple[str, Any, Shards]]:
    """Return the adapter layers on weights that a plan cuts: their names, and the cut of the weight. peft names the
    weight if it is not that of a linear (`target_parameters`)."""
    every = ((name, module, getattr(module, "parameter_name", "weight")) for name, module in model.named_modules())
    named = ((name, module, plan.cuts.get(f"{name}.{weight}")) for name, module, weight in every)
    return [(name, module, cut) for name, module, cut in named if cut is not None and hasattr(module, "base_layer")]


def _cut_pair(into: nn.Linear, out: nn.Linear, cut: Shards, rank: int) -> None:
    """Cut the matrices of one adapter: the first by inputs if the linear is cut by inputs, else the second by
    outputs."""
    if cut.dim == 1:
        _cut_part(into, "weight", cut, rank)
        if out.bias is not None and rank > 0 and PLAIN not in vars(type(out)):
            subclass_in_place(out, {"forward": unless_whole(_without_bias), PLAIN: type(out)})
        return
    for name, _ in list(out.named_parameters()):
        _cut_part(out, name, cut, rank)


def _drop_own_part(dropout: nn.Module, cut: Shards, rank: int) -> None:
    """Make the dropout in front of an adapter on cut inputs draw for all of them, as one rank does, and use the part of
    this rank."""
    if type(dropout) is not nn.Dropout:
        return

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return input
        factors = F.dropout(input.new_ones((*input.shape[:-1], cut.total)), self.p)
        return input * Slice(input.ndim - 1, cut.ranks[rank]).take(factors)

    subclass_in_place(dropout, {"forward": unless_whole(forward), PLAIN: type(dropout)})


def _without_bias(self: Any, input: torch.Tensor) -> torch.Tensor:
    """Run a linear without its bias, which is part of one rank's summand, like the linear's own; the bias stays for
    code that makes the linear whole."""
    return F.linear(input, self.weight)


def _cut_part(linear: nn.Linear, name: str, cut: Shards, rank: int) -> None:
    whole = getattr(linear, name)
    if whole.shape[cut.dim] == cut.total:
        with torch.no_grad():
            setattr(linear, name, nn.Parameter(cut.of(rank).take(whole), whole.requires_grad))
    elif not takes_slices(linear):
        raise UnsupportedError(f"an adapter was made on slices, with other weights on each rank: load it, {ONE_RANK}")
    take_slices(linear, {name: cut}, rank)
    if name == "weight":
        linear.out_features, linear.in_features = linear.weight.shape


def _finish_once(layer: nn.Module, finish: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Run the sum (or gather) behind a linear after its adapters have added their part."""
    own_forward = type(layer).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with unfinished(self.base_layer):
            part = own_forward(self, *args, **kwargs)
        return finish(part)

    members = {"forward": functools.wraps(own_forward)(unless_whole(forward)), "_finishes": True, PLAIN: type(layer)}
    subclass_in_place(layer, members)


def adapter_members(model: nn.Module, plan: TensorPlan, ranks: Collectives) -> dict[str, Any]:
    """Return replacements for the methods that add adapters to a cut model."""
    members: dict[str, Any] = {name: _loading(type(model), name, plan, ranks) for name in LOAD if hasattr(model, name)}
    if hasattr(model, "add_adapter"):
        members["add_adapter"] = _refused("add_adapter makes new weights, other ones on each rank: load an adapter")
    if hasattr(model, "save_lora_adapter"):
        members["save_lora_adapter"] = _refused("save_lora_adapter would save slices: save it before parallelize")
    return members


LOAD = ("load_lora_adapter", "load_adapter")
"""Methods of models that load adapters."""


def _loading(cls: Any, name: str, plan: TensorPlan, ranks: Collectives) -> Callable[..., Any]:
    own_method = getattr(cls, name)

    @functools.wraps(own_method)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _swaps(self, named(own_method, args, kwargs).get("hotswap")):
            raise UnsupportedError(f"hotswap does not work on cut linears: unload the adapter first, {ONE_RANK}")
        boundary = getattr(self, "shardit_boundary", None)  # of a component that one group of ranks runs
        try:
            with whole_sizes(self, plan), boundary.original_classes() if boundary is not None else nullcontext():
                out = own_method(self, *args, **kwargs)
            cut_adapters(self, plan, ranks)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, UnsupportedError) as error:
            others = list(getattr(self, "peft_config", {}))
            plan.family.unload_adapters(self)  # a partly loaded adapter would compute wrong results
            lost = f"; with it {', '.join(others)} of this model were unloaded" if others else ""
            if isinstance(error, UnsupportedError):
                raise UnsupportedError(f"{error}{lost}") from error
            if "size mismatch" in str(error) and "magnitude" not in str(error):  # DoRA's fits the whole weight only
                raise RuntimeError(f"{error}{lost}") from error
            raise UnsupportedError(
                f"the adapter is not plain LoRA, and its linears are cut ({first_line(error)}): merge it before, "
                f"{ONE_RANK}{lost}"
            ) from error
        return out

    return load


def _swaps(model: Any, asked: Any) -> bool:
    """Return whether a loaded adapter replaces another one. Without an argument, transformers models decide themselves:
    once hotswapping was enabled, from the second adapter on."""
    by_itself = asked in (None, "auto") and getattr(model, "_hotswap_enabled", False)
    return asked is True or bool(by_itself and getattr(model, "peft_config", None))


@contextmanager
def whole_sizes(model: nn.Module, plan: TensorPlan, weights: Weights | None = None) -> Iterator[None]:
    """Temporarily give linears the sizes that they have without cuts; with `weights`, weights of these shapes, too."""
    changed: list[tuple[Any, str, Any]] = []
    for name, module in model.named_modules():
        cut = plan.cuts.get(f"{name}.weight")
        linear = getattr(module, "base_layer", module)
        if cut is None or not isinstance(linear, nn.Linear):
            continue
        side = "in_features" if cut.dim == 1 else "out_features"
        changed.append((linear, side, getattr(linear, side)))
        setattr(linear, side, cut.total)
        if weights is not None:
            changed.append((linear, "weight", linear.weight))
            linear.weight = nn.Parameter(weights(linear), False)
    try:
        yield
    finally:
        for thing, name, value in changed:
            setattr(thing, name, value)


Weights = Callable[[nn.Linear], torch.Tensor]
"""Returns a weight of the present size of a linear, whose values are not read."""


def _on_meta(linear: nn.Linear) -> torch.Tensor:
    return torch.empty(linear.out_features, linear.in_features, device="meta")


def _without_memory(linear: nn.Linear) -> torch.Tensor:
    return torch.zeros((), device=linear.weight.device).expand(linear.out_features, linear.in_features)


EXPANDS: dict[str, Weights] = {
    "_maybe_expand_transformer_param_shape_or_error_": _on_meta,
    "_maybe_expand_lora_state_dict": _without_memory,  # it makes the adapter's weights on the device of these
}
"""Methods of some pipelines of diffusers that enlarge a linear, or an adapter, if the other is larger; and the weights
that they compare."""


def pipeline_members(cls: type, plans: dict[int, TensorPlan]) -> dict[str, Any]:
    """Return replacements for a pipeline's methods that compare sizes of adapters and linears. plans: by id of the
    model."""

    def comparing(name: str) -> Callable[..., Any]:
        own_method = getattr(cls, name)

        def compare(self: Any, transformer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            plan = plans.get(id(transformer))
            if plan is None:
                return own_method(transformer, *args, **kwargs)
            with whole_sizes(transformer, plan, EXPANDS[name]):
                return own_method(transformer, *args, **kwargs)

        return compare

    return {name: comparing(name) for name in EXPANDS if hasattr(cls, name)}


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def _is_lora(module: Any) -> bool:
    pairs = hasattr(module, "lora_A") and isinstance(module.base_layer, nn.Linear)
    return pairs and not any(getattr(module, "use_dora", {}).values())


def _refused(why: str) -> Callable[..., None]:
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(f"{why}, {ONE_RANK}")

    return method
