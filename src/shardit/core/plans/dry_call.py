"""Tests whether a call follows a known plan: its forward runs without blocks and is traced.

All data that does not derive from a block is real and the same on every rank, so each rank comes to the same answer
without a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.modules.block_calls import BlockCalls
from shardit.core.plans.call_plan import CallPlan, Site, describe_result
from shardit.core.plans.derive import derive
from shardit.core.plans.stand_ins import blank, stand_ins
from shardit.core.plans.trace import Trace, TraceContext
from shardit.core.runtime.flat_call import FlatCall, describe_leaf
from shardit.core.runtime.randomness import generators_kept
from shardit.errors import RankError


class PlanMismatch(BaseException):
    """Leaves a forward that does not follow the plan. Not an Exception: models may catch those."""


def expected_site(sites: Sequence[Site], number: int, index: int, arguments: list[Any]) -> Site:
    """Return the call site of a plan with this number. Raises PlanMismatch if it is none of this block with such
    arguments."""
    site = sites[number] if number < len(sites) else None
    if site is None or (site.block, site.given) != (index, tuple(map(describe_leaf, arguments))):
        raise PlanMismatch
    return site


class DryCall:
    """Intercepts block calls while a forward runs without blocks.

    trace: the operations outside blocks; `trace.deciding` lists the arguments whose values the forward has read.
    """

    def __init__(self, plan: CallPlan, device: torch.device):
        self.plan, self.device = plan, device
        self.trace = Trace()
        self._watch = TraceContext(self.trace, lambda tensor: tensor)

    def fits(self, calls: BlockCalls, forward: Callable[..., Any], call: FlatCall) -> bool:
        """Return whether the plan is valid for this call. Sends nothing."""
        self.trace.begin(call.leaves)
        try:
            with calls.intercepted_by(self), torch.no_grad(), generators_kept(self.device), self._watch:
                out = forward(*call.args, **call.kwargs)
            leaves, spec = tree_flatten(out)
            found = derive(self.trace, leaves, spec, tuple(describe_result(leaf) for leaf in leaves))
            return len(self.trace.sites) == len(self.plan.sites) and found.digest() == self.plan.digest()
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, PlanMismatch):  # the first call follows and reports the error, if there is one
            return False

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return stand-ins for the block's output in the first call."""
        with self._watch.paused():
            n = len(self.trace.sites)
            arguments, _ = tree_flatten((args, kwargs))
            site = expected_site(self.plan.sites, n, index, arguments)
            leaves = stand_ins(site, arguments, lambda leaf: (blank(leaf, self.device), 0))
            self.trace.block(site, arguments, leaves, list(site.mutated))
            return tree_unflatten(leaves, site.spec)
