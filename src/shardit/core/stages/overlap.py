"""Calls that wait for messages inside their blocks (slices, sharded tokens): while one waits, another computes.

The two branches of guidance, or several requests, are in flight together. A forward runs until it has started to send
something, then the next one goes on; so messages travel, and ranks that are behind catch up, while everybody computes.
The order is that of the calls, the same on every rank, whether or not a message has come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from shardit.core.modules.patching import changing_methods, subclass_in_place
from shardit.core.modules.state.module_state import differences, split_classes, state_of
from shardit.core.modules.transient import TransientChanges
from shardit.core.plans.call_plan import ResultPlan, describe_result
from shardit.core.plans.known_plans import MAX_SIGNATURES
from shardit.core.runtime.coroutine import Coroutine
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.runtime.pending import materialize
from shardit.core.runtime.randomness import any_moved, moved, states, torch_states
from shardit.core.runtime.versions import check_unchanged, inputs_of
from shardit.core.runtime.yielding import looking, yielding_coroutine
from shardit.core.stages.entry import ModelEntry, inside
from shardit.core.stages.first_call import object_in
from shardit.core.stages.result import Result
from shardit.core.stages.runtime import Runtime
from shardit.core.stages.user_code import UserCode, scales_adapters
from shardit.errors import RankError, UnsupportedError


class OverlappedCall:
    """A forward in flight (a `Flight`). It has a segment for each time it waited, known as it goes."""

    def __init__(
        self,
        model: nn.Module,
        plan: ResultPlan,
        runtime: Runtime,
        forward: Callable[..., Any],
        call: FlatCall,
        generators: list[Any],
    ):
        self.finished = False
        self.owners = [runtime.mesh.pp_rank]
        self.failure: Exception | None = None
        self._model, self._forward, self._call, self._runtime = model, forward, call, runtime
        self._generators = generators
        self._inputs = inputs_of(call.leaves)
        self._result = Result(plan, runtime.mesh.device, self._materialize)
        self._coroutine = Coroutine(self._run)

    def result(self) -> Any:
        """Result of forward, with pending tensors."""
        return self._result.tree()

    def begin(self) -> None:
        """Run to the first message."""
        self._resume()

    def run(self, segment: int) -> None:
        """Go on to the next message. A failure is raised when the result is used: now another request has its turn."""
        check_unchanged(self._inputs, self._runtime.mesh.rank)
        try:
            self._resume()
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            self.failure = error

    def post(self, segment: int) -> None:
        """Nothing arrives here from another stage."""

    def finish(self) -> None:
        """The result is here on every rank."""
        self._inputs.clear()

    def _resume(self) -> None:
        self._coroutine.resume()
        if not self._coroutine.done:
            self.owners.append(self.owners[0])

    def _materialize(self) -> None:
        self._runtime.wait_for(self)
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        yielding_coroutine.set(self._coroutine)
        device, program = self._runtime.mesh.device, self._runtime.loop.current
        before = torch_states(device, self._generators)
        with torch.no_grad():
            forward, call = self._forward, self._call
            del self._forward, self._call
            leaves, _ = tree_flatten(forward(*call.args, **call.kwargs))
            materialize(leaves)
            if self._runtime.loop.current is program and any_moved(before, torch_states(device, self._generators)):
                raise UnsupportedError(
                    f"{type(self._model).__name__} draws random numbers in some of its calls, several of which are in "
                    "flight together: use Plan(overlap=False)"
                )
            expected = self._result.plan.leaves
            if len(leaves) != len(expected) or not all(map(_fits, expected, leaves)):
                raise UnsupportedError(
                    f"{type(self._model).__name__} returns other shapes or values than in the first call of this "
                    "signature: use Plan(overlap=False)"
                )
            for number, view in self._result.views():
                view.copy_(leaves[number])


@dataclass
class Overlap:
    """One model whose calls may be in flight together. overlapped: how many have been. generators: random generators
    that its modules and hooks have.

    scales: see TransformerStages. alone: whether that holds for calls by a user's own program, too: their results must
    then be used by all ranks, in the same order. Of a pipeline that is known. users: code and adapters of users in it.
    """

    model: nn.Module
    runtime: Runtime
    scales: str
    alone: bool
    users: UserCode = field(default_factory=UserCode)
    overlapped: int = 0
    generators: list[Any] = field(default_factory=list)
    _plans: OrderedDict[Any, ResultPlan] = field(default_factory=OrderedDict)

    def call(self, forward: Callable[..., Any], call: FlatCall) -> Any:
        """Make a call of the model: it returns at once with pending tensors, except the first of each signature."""
        # A cache keeps a call's state on the model, and a scale multiplies weights for the length of the forward.
        alone = (
            getattr(self.model, "is_cache_enabled", False)
            or scales_adapters(call.kwargs, self.scales)
            or torch.is_grad_enabled()
        )
        alone = alone or not all(map(_plain, call.leaves))
        alone = alone or not (self.runtime.in_pipeline or (self.alone and not self.users.may_change))
        key = None if alone else call.signature(self.model.training)
        plan = self._plans.get(key)
        if plan is None:
            self.runtime.schedule.drain()
            return self._first(key, forward, call)
        self._plans.move_to_end(key)
        self.overlapped += 1
        flight = OverlappedCall(self.model, plan, self.runtime, forward, call, self.generators)
        self.runtime.schedule.start(flight)
        return flight.result()

    def relearn(self, runs: bool, adapted: bool) -> None:
        """As `TransformerStages.relearn`."""
        self.users = UserCode(runs, adapted)

    def forget(self) -> None:
        """The model has been changed: what its calls return is found again."""
        self._plans.clear()

    def _first(self, key: Any, forward: Callable[..., Any], call: FlatCall) -> Any:
        device = self.runtime.mesh.device
        before, drawn = (state_of(self.model), states(device, [])) if key is not None else (None, {})
        transient = None if before is None else TransientChanges(lambda: state_of(self.model), self.model, before)
        token = looking.set(transient.sample if transient is not None else None)
        try:
            out = forward(*call.args, **call.kwargs)
            materialize(out)
        finally:
            looking.reset(token)
        # A forward that keeps something on its modules may read it later, and the order of what draws random numbers
        # counts: neither is overlapped, until a call does not.
        if before is None or object_in(out) is not None:
            return out
        now = state_of(self.model)
        self.generators = now.generators()
        if split := split_classes(before, now):
            raise UnsupportedError(
                f"{type(self.model).__name__} changes {split[0]} through type(self), which is another class for each "
                "module that is sharded: name the class, or keep it on the module"
            )
        kept = differences(before, now) or differences(before, now, outside=True)
        kept = kept or (transient.found(now) if transient is not None else [])
        if not kept and not moved(drawn, states(device, [])):
            leaves, spec = tree_flatten(out)
            self._plans[key] = ResultPlan.of(spec, tuple(map(describe_result, leaves)))
            if len(self._plans) > MAX_SIGNATURES:
                self._plans.popitem(last=False)
        return out


def overlap(model: nn.Module, runtime: Runtime, scales: str = "", alone: bool = False) -> Overlap:
    """Let calls of a model be in flight together, in place. Its messages must `yield_while_waiting`. `scales`,
    `alone`: see Overlap."""
    calls = Overlap(model, runtime, scales, alone)
    ModelEntry(model, calls.call)

    def end() -> None:
        if inside.get() is None:
            runtime.schedule.drain()

    members = {**changing_methods(type(model), end), "shardit_overlap": property(lambda self: calls)}
    subclass_in_place(model, members)
    return calls


def _plain(leaf: Any) -> bool:
    """Return whether an argument cannot be something that a forward writes to, such as a cache of keys."""
    return isinstance(leaf, (torch.Tensor, bool, int, float, str, bytes, type(None), torch.dtype, torch.device))


def _fits(expected: Any, leaf: Any) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return expected.kind == "value" and (expected.value is leaf or expected.value == leaf)
    return expected.kind == "tensor" and (expected.dtype, expected.size) == (leaf.dtype, tuple(leaf.shape))
