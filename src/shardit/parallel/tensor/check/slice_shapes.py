"""The shapes of a model's slices: a whole tensor put in place of one would run whole on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.parallel.tensor.adapters import base_linears
from shardit.parallel.tensor.plan import TensorPlan


@dataclass(frozen=True)
class SliceShape:
    """A parameter that is cut, and its shape on this rank. holder: the parameters of its module; plan: it says whether
    the parameter is still cut."""

    name: str
    leaf: str
    holder: dict[str, Any]
    shape: torch.Size
    plan: TensorPlan

    @property
    def now(self) -> torch.Size:
        """The present shape."""
        held = self.holder.get(self.leaf)
        return self.shape if held is None else held.shape


def slice_shapes(model: nn.Module, plan: TensorPlan) -> list[SliceShape]:
    """Return the shapes of the parameters that a plan cuts, as they are now."""
    found = []
    with base_linears(model):
        modules = dict(model.named_modules(remove_duplicate=False))
    for name in plan.cuts:
        owner, _, leaf = name.rpartition(".")
        held = modules[owner]._parameters.get(leaf) if owner in modules else None
        if held is not None:
            found.append(SliceShape(name, leaf, modules[owner]._parameters, held.shape, plan))
    return found


def first_whole(slices: Sequence[SliceShape]) -> SliceShape | None:
    """Return the first parameter that has another shape although it is still cut; None if there is none."""
    return next((one for one in slices if one.now != one.shape and one.name in one.plan.cuts), None)
