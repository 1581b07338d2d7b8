"""Tests whether a loss follows a known course: it runs without blocks and is watched.

A mask that the model looks at has new values in each micro-batch, though the course is mostly the same. All data that
does not derive from a block is real and the same on every stage, so each finds the same, without a message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.modules.blocks import CutModel
from shardit.core.plans.call_plan import Address
from shardit.core.plans.course import CourseMismatch, expected_site
from shardit.core.plans.stand_ins import blank, stand_ins
from shardit.core.plans.trace import TraceContext
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.training.course import Course, Look
from shardit.core.training.watch import LossTrace
from shardit.errors import RankError


class DryLoss:
    """Intercepts block calls while a loss runs without blocks. Its fields are those of a `WatchedLoss`."""

    def __init__(self, cut: CutModel, course: Course, device: torch.device):
        self.cut, self.course, self.device = cut, course, device
        self.trace, self.looks = LossTrace(), dict[Address, Look]()
        self.drawing = [0] if course.draws else []
        self._watch = TraceContext(self.trace, lambda tensor: tensor)

    def fits(self, loss: Callable[[], Any], call: FlatCall, course_of: Callable[[DryLoss, int], Course]) -> bool:
        """Return whether the loss has this course. course_of: derives a course from a trace and the loss in it."""
        self.trace.begin(call.leaves)
        try:
            with self.cut.calls.intercepted_by(self), torch.enable_grad(), self._watch:
                out = loss()
            self.trace.refuse_decisions()
            same_length = len(self.trace.sites) == len(self.course.sites)
            return same_length and course_of(self, self.trace.number(out)).digest() == self.course.digest()
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, CourseMismatch):  # the loss is watched then, and reports the error if there is one
            return False

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return stand-ins for the block's output in the watched call."""
        with self._watch.paused():
            number = len(self.trace.sites)
            given, _ = tree_flatten((args, kwargs))
            site = expected_site(self.course.sites, number, index, given)
            with torch.no_grad():
                leaves = stand_ins(site, given, lambda leaf: (blank(leaf, self.device), 0))
            for kind, values in (("arg", given), ("out", leaves)):
                for place, leaf in enumerate(values):
                    if isinstance(leaf, torch.Tensor):
                        self.looks[Address(number, kind, place)] = Look.of(leaf)
            tensors = [leaf if isinstance(leaf, torch.Tensor) else None for leaf in given]
            self.trace.block(site, tensors, leaves, list(site.mutated))
            return tree_unflatten(leaves, site.spec)
