"""The guidance axis: the calls of one step (its branches, or samples of a batch) are assigned to replicas of the
model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_map_only

from shardit.core.comm.p2p import Transfer
from shardit.core.plans.call_plan import CallPlan
from shardit.core.runtime.pending import PendingSource
from shardit.core.runtime.program import Flight
from shardit.core.stages.result import Result, Route
from shardit.errors import InputError

log = logging.getLogger(__name__)


class RemoteCall:
    """A call that another replica runs (a `Flight`): this rank only gets its result."""

    def __init__(self, plan: CallPlan, route: Route, replica: int, wait: Callable[[Flight], None]):
        self.owners, self.finished = plan.owners, False
        self._route, self._replica, self._wait = route, replica, wait
        self._receive: Transfer | None = None
        self._result = Result(plan.result, route.comm.group.device, self._materialize)

    def result(self) -> Any:
        """Result of forward, with pending tensors."""
        return self._result.tree()

    def _materialize(self) -> None:
        self._wait(self)
        if self._receive is not None:
            self._route.comm.wait(self._receive)

    def begin(self) -> None:
        """Nothing runs here."""

    def run(self, segment: int) -> None:
        """Nothing runs here."""

    def post(self, segment: int) -> None:
        """Nothing arrives here but the result."""

    def finish(self) -> None:
        """Post the receive of the result."""
        if self._result.plan.layout.total:
            self._receive = self._route.receive(self._replica, self.owners[-1], self._result.memory)


@dataclass
class GuidanceStep:
    """The calls of the present step of one request, and what the step before it had.

    assigned: pieces that were given to a replica. calls: since a result was last waited for. samples: of the last one.
    branches: calls of a step, once known.
    """

    assigned: int = 0
    calls: int = 0
    samples: int = 1
    branches: int | None = None


@dataclass
class GuidanceScheduler:
    """Assigns calls to the replicas of the guidance axis, in turn; the same on every rank.

    A step ends when its program first waits for a result: the calls before that are its branches.
    """

    size: int
    index: int
    rank: int
    steps: WeakKeyDictionary[Any, GuidanceStep] = field(default_factory=WeakKeyDictionary)
    warned: bool = False

    def begin(self, program: object) -> None:
        """A pipeline is called again: how many branches its steps have is not known yet."""
        self.steps.pop(program, None)

    def parts(self, program: object, samples: int) -> int:
        """Return the number of pieces for a call of `samples` samples, so that every replica has work (1 in the first
        step).

        Raises InputError if there are more replicas than pieces of work.
        """
        step = self._step(program)
        step.calls += 1
        step.samples = samples
        if self.size == 1 or step.branches is None:
            return 1
        return -(-self.size // step.branches) if self._check(step.branches, samples) else 1

    def _check(self, branches: int, samples: int) -> bool:
        """Return whether there is something to share."""
        work = branches * samples
        if work == 1:
            self._warn_idle()
        elif work < self.size:
            raise InputError(
                f"cfg_parallel_size={self.size} is more than the {branches} branches x {samples} samples of a step; "
                f"use at most {work}"
            )
        return work > 1

    def next(self, program: object) -> int:
        """Return the replica that runs the next piece."""
        step = self._step(program)
        step.assigned += 1
        return (step.assigned - 1) % self.size

    def mark_used(self, out: Any, program: object) -> Any:
        """Wrap a finished result so that its first use still ends the step."""
        if self.size == 1:
            return out
        source = PendingSource(lambda: self.waits(program))
        return tree_map_only(torch.Tensor, source.wrap, out)

    def waits(self, program: object) -> None:
        """Note that the program waits for a result. Raises InputError as `parts` does if this ends the first step."""
        step = self._step(program)
        calls, step.calls = step.calls, 0
        if calls and step.branches is None:
            step.branches = calls
            if self.size > 1:
                self._check(calls, step.samples)

    def _step(self, program: object) -> GuidanceStep:
        return self.steps.setdefault(program, GuidanceStep())

    def _warn_idle(self) -> None:
        if not self.warned and self.rank == 0:
            log.warning(
                "cfg_parallel_size=%d idles: a step has one branch of one sample. Guidance needs guidance_scale > 1, "
                "or, if the pipeline has it, true_cfg_scale > 1 and a negative prompt; with split_batch=False a batch "
                "counts as one sample",
                self.size,
            )
        self.warned = True
