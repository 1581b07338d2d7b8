"""The slices of a model, to notice what code of users does with them: it sees a slice in place of the whole tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.core.runtime.versions import version_of
from shardit.parallel.tensor.adapters import base_linears
from shardit.parallel.tensor.check.taken_data import watch_data, written_by_data
from shardit.parallel.tensor.load_state_dict import loads_of
from shardit.parallel.tensor.plan import TensorPlan


@dataclass(frozen=True)
class HeldSlice:
    """A parameter that is cut, as it was when this was made. owner: its module; plan: decides whether the parameter is
    still cut. version: torch's counter of writes in place; loads: how often its module has loaded weights."""

    name: str
    leaf: str
    owner: nn.Module
    held: nn.Parameter
    shape: torch.Size
    version: int | None
    loads: int
    plan: TensorPlan

    @property
    def now(self) -> Any:
        """The present parameter; None if there is none under its name."""
        return self.owner._parameters.get(self.leaf)

    def problem(self) -> str | None:
        """Return the change that makes it another part of the whole tensor than ranks expect; None if there is none."""
        now, cut = self.now, self.plan.cuts.get(self.name)
        if cut is None:
            return None
        if now is None:
            return "was taken out of its module" if hasattr(self.owner, self.leaf) else None
        if now.shape != self.shape and now.ndim > cut.dim and now.shape[cut.dim] == cut.total:
            return f"was replaced by a tensor of shape {list(now.shape)}"
        written = now is self.held and (version_of(now) != self.version or written_by_data(now))
        return "was written to" if written and loads_of(self.owner) == self.loads else None


def slices_of(model: nn.Module, plan: TensorPlan) -> list[HeldSlice]:
    """Return the parameters that a plan cuts, as they are now."""
    found = []
    with base_linears(model):
        modules = dict(model.named_modules(remove_duplicate=False))
    for name in plan.cuts:
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        held = None if owner is None else owner._parameters.get(leaf)
        if owner is not None and held is not None:
            watch_data(held)
            found.append(HeldSlice(name, leaf, owner, held, held.shape, version_of(held), loads_of(owner), plan))
    return found


def first_problem(slices: Sequence[HeldSlice]) -> tuple[HeldSlice, str] | None:
    """Return the first slice with a problem, and that; None if there is none."""
    return next(((one, problem) for one in slices if (problem := one.problem()) is not None), None)
