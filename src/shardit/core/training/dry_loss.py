"""Tests whether a loss follows a known plan: it runs without blocks and is watched.

A mask that the model looks at has new values in each micro-batch, though the plan is mostly the same. All data that
does not derive from a block is real and the same on every stage, so each finds the same, without a message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.modules.blocks import CutModel
from shardit.core.plans.call_plan import Address
from shardit.core.plans.dry_call import PlanMismatch, expected_site
from shardit.core.plans.stand_ins import blank, stand_ins
from shardit.core.plans.trace import TraceContext
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.training.first_loss import LossTrace
from shardit.core.training.loss_plan import Layout, LossPlan
from shardit.errors import RankError


class DryLoss:
    """Intercepts block calls while a loss runs without blocks. Its fields are those of a `WatchedLoss`."""

    def __init__(self, cut: CutModel, plan: LossPlan, device: torch.device):
        self.cut, self.plan, self.device = cut, plan, device
        self.trace, self.layouts = LossTrace(), dict[Address, Layout]()
        self.drawing = [0] if plan.draws else []
        self._watch = TraceContext(self.trace, lambda tensor: tensor)

    def fits(self, loss: Callable[[], Any], call: FlatCall, plan_of: Callable[[DryLoss, int], LossPlan]) -> bool:
        """Return whether the loss has this plan. plan_of: derives a plan from a trace and the loss in it."""
        self.trace.begin(call.leaves)
        try:
            with self.cut.calls.intercepted_by(self), torch.enable_grad(), self._watch:
                out = loss()
            self.trace.refuse_decisions()
            same_length = len(self.trace.sites) == len(self.plan.sites)
            return same_length and plan_of(self, self.trace.number(out)).digest() == self.plan.digest()
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, PlanMismatch):  # the loss is watched then, and reports the error if there is one
            return False

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return stand-ins for the block's output in the watched call."""
        with self._watch.paused():
            number = len(self.trace.sites)
            given, _ = tree_flatten((args, kwargs))
            site = expected_site(self.plan.sites, number, index, given)
            with torch.no_grad():
                leaves = stand_ins(site, given, lambda leaf: (blank(leaf, self.device), 0))
            for kind, values in (("arg", given), ("out", leaves)):
                for place, leaf in enumerate(values):
                    if isinstance(leaf, torch.Tensor):
                        self.layouts[Address(number, kind, place)] = Layout.of(leaf)
            self.trace.block(site, given, leaves, list(site.mutated))
            return tree_unflatten(leaves, site.spec)
