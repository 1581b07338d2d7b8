"""A transformer under a declared sequence plan: tensors are split and gathered as declared, checked against the whole
model.

Each new signature of a call is learned first: the model runs whole on every rank, then over the ranks, where lengths
are compared to find the split dimensions at each attention call (`attention_steps.py`). Both results must agree; else
the call is refused. Later calls follow the learned steps without further messages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from shardit.core.modules.block_calls import intercept_calls
from shardit.core.modules.state.module_state import State, copy_aliases, new_values, restore, state_of
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.runtime.microbatch import CLOSE
from shardit.core.runtime.pending import materialize
from shardit.core.runtime.randomness import generators_kept
from shardit.core.runtime.yielding import without_yielding
from shardit.core.stages.transformer_stages import TransformerStages
from shardit.errors import InputError, RankError, UnsupportedError
from shardit.parallel.attention.block_attention import DONE, FAILED, exchange_state
from shardit.parallel.attention.hook import intercept_attention
from shardit.parallel.attention.sequence_attention import SequenceAttention
from shardit.parallel.compare import perturbed, same, same_left
from shardit.parallel.sequence.declared.attention_steps import Seen, Step
from shardit.parallel.sequence.declared.module_hooks import call_module
from shardit.parallel.sequence.declared.passes import Pass, PassMismatch, ReferencePass, ShardedPass
from shardit.parallel.sequence.declared.rules import ModuleRules, read_plan

MAX_SIGNATURES = 1024
"""Signatures whose steps are remembered per transformer, more than stages remember; the least recently used one is
dropped first."""

SLACK = 2.0
"""The bound on differences, in units of `CLOSE`: a random input is harder than an image."""

Forward = Callable[..., Any]


@dataclass
class RunningForward:
    """One running forward of a planned model."""

    owner: PlannedSequence
    current: Pass


_running: ContextVar[RunningForward | None] = ContextVar("shardit_planned", default=None)


def running_pass() -> Pass | None:
    """Return the pass of the running forward, if it is under a declared plan."""
    running = _running.get()
    return None if running is None else running.current


def runs_whole() -> bool:
    """Return whether a forward runs whole, on one rank alone, to record its steps."""
    return isinstance(running_pass(), ReferencePass)


@dataclass
class PlannedSequence:
    """One transformer with a declared plan.

    checked: number of comparisons with the whole model. stages: its pipeline stages, if it has any.
    """

    model: nn.Module
    attention: SequenceAttention
    attribute: str
    rules: list[ModuleRules]
    stages: TransformerStages | None = None
    checked: int = 0
    _steps: OrderedDict[Any, list[Step]] = field(default_factory=OrderedDict)

    @property
    def by_hand(self) -> bool:
        """Whether the model's own code splits and gathers, without rules in the plan."""
        return not self.rules

    @property
    def padded(self) -> bool:
        """Whether the plan pads anything."""
        return any(rule.pad for rules in self.rules for rule in rules.splits())

    def forward(self, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the transformer; its result is plain and the same on all ranks."""
        running = _running.get()
        if running is not None and running.owner is self:  # the forward calls the model itself
            return call(*args, **kwargs)
        materialize((args, kwargs))
        key = FlatCall.of(args, kwargs).signature(self.model.training)
        if key not in self._steps:
            self._learn(key, call, args, kwargs, noise=True)
        self._steps.move_to_end(key)
        try:
            return self._run(ShardedPass(self.attention, self._steps[key]), call, args, kwargs)
        except PassMismatch as error:  # lengths depend on values; all ranks see it at the same point
            if self.stages is not None:
                raise UnsupportedError(
                    f"{self._name} does something else than in its first call of this shape ({error}), which stages "
                    "cannot follow: set pipeline_parallel_size=1 and cfg_parallel_size=1"
                ) from error
            self._learn(key, call, args, kwargs, noise=False)
            return self._run(ShardedPass(self.attention, self._steps[key]), call, args, kwargs)

    def forget(self) -> None:
        """Forget all shapes after a change of the model: each is learned and compared with the whole model again."""
        self._steps.clear()

    def _run(self, how: Pass, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token = _running.set(RunningForward(self, how))
        try:
            with torch.no_grad(), intercept_attention(how):
                out = call(*args, **kwargs) if self._own is None else call_module(how, self._own, call, args, kwargs)
                materialize(out)
            if isinstance(how, ShardedPass):
                how.finish()
            return out
        finally:
            _running.reset(token)

    # Learning.

    def _learn(self, key: Any, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], noise: bool) -> None:
        """Learn the steps of a call, from its arguments with noise if the model takes those: in a user's arguments, a
        mask may hide nothing and tokens may be equal."""
        leaves, spec = tree_flatten((args, kwargs))
        with without_yielding():  # random states restored below must not leak into another request's turn
            self._learn_from(key, call, leaves, spec, noise)

    def _learn_from(self, key: Any, call: Forward, leaves: list[Any], spec: Any, noise: bool) -> None:
        kept = state_of(self.model)
        with self._untraced() as run:
            given, expected = perturbed(leaves) if noise else leaves, None
            try:
                expected = self._whole(run, call, given, spec, kept)
            except (RankError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                if not noise:
                    raise
            if expected is None:  # a model that refuses such values: use the real ones
                restore(kept)
                given, expected = leaves, self._whole(run, call, leaves, spec, kept)
            restore(kept)
            self._steps[key] = self._compare(run, call, given, spec, kept, *expected)
        restore(kept)
        if len(self._steps) > MAX_SIGNATURES:
            self._steps.popitem(last=False)

    @contextmanager
    def _untraced(self) -> Iterator[Callable[[Forward, Any], Any]]:
        """Yield a function that runs the model untraced by stages, on all stages."""
        if self.stages is None:
            yield lambda forward, arguments: forward()
        else:
            with self.stages.cut.untraced():
                yield self.stages.first.watched

    def _whole(self, run: Any, call: Forward, leaves: list[Any], spec: Any, kept: State) -> tuple[Any, list[Seen]]:
        """Run the whole model. Return its result, its state afterwards, and its course."""
        whole = ReferencePass()
        given = tree_map_only(torch.Tensor, torch.clone, leaves)
        args, kwargs = tree_unflatten(given, spec)
        with generators_kept(self.attention.sp.group.device):
            out = run(lambda: self._run(whole, call, args, kwargs), given)
        if not all(same(a, b) for a, b in zip(leaves, given, strict=True) if isinstance(a, torch.Tensor)):
            self._refuse("it writes to its arguments", None)
        return (copy_aliases(kept, out), new_values(kept, state_of(self.model))), whole.events

    def _compare(
        self, run: Any, call: Forward, leaves: list[Any], spec: Any, kept: State, expected: Any, events: list[Seen]
    ) -> list[Step]:
        """Return the steps over the ranks of a call, if its result equals that of the whole model."""
        self.checked += 1
        given = tree_map_only(torch.Tensor, torch.clone, leaves)
        args, kwargs = tree_unflatten(given, spec)
        sharded, error, got = ShardedPass(self.attention, [], events, self.padded), None, None
        try:
            with generators_kept(self.attention.sp.group.device):
                got = run(lambda: self._run(sharded, call, args, kwargs), given)
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as failure:  # a model that cannot take such shards may raise any exception
            error = failure
        if sharded.peer_failed:
            self._refuse("another rank fails", error)
        self._agree(error is None, "it fails" if error is not None else "another rank fails", error)
        what = _difference(expected[0], got, self._bound())
        if what is None and not same_left(expected[1], new_values(kept, state_of(self.model))):
            what = "what it leaves on its modules is another thing over the ranks"
        self._agree(what is None, what or "another rank gets a wrong result", None)
        return sharded.steps

    def _agree(self, good: bool, what: str, error: Exception | None) -> None:
        """Continue if all ranks agree that the result is good; else raise on all of them."""
        gathered = exchange_state(self.attention, DONE if good else FAILED)
        if any(codes[0] != DONE for codes in gathered):
            self._refuse(what, error)

    def _refuse(self, what: str, error: Exception | None) -> NoReturn:
        if isinstance(error, InputError):
            raise error
        why = f" ({type(error).__name__}: {error})" if error is not None and str(error) else ""
        raise UnsupportedError(
            f"{self._name} over {self.attention.sp.size} ranks, as {self.attribute} says: {what}{why}. Between a split "
            "and its gather a module may only use its own tokens, outside of attention (docs/sequence-plans.md)"
        ) from error

    def _bound(self) -> float:
        """Return the tolerance of a result: that of the shortest floats in it."""
        kinds = {p.dtype for p in self.model.parameters()} | {torch.float32}
        device = self.attention.sp.group.device.type
        if torch.is_autocast_enabled(device):
            kinds.add(torch.get_autocast_dtype(device))
        return SLACK * max(CLOSE.get(kind, 0.0) for kind in kinds)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    # Calls of modules in the plan.

    def module_call(self, rules: ModuleRules, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of a module: split its inputs before, split or gather its outputs after it."""
        running = _running.get()
        if running is None or running.owner is not self:
            return call(*args, **kwargs)
        return call_module(running.current, rules, call, args, kwargs)

    def install(self) -> None:
        """Put the interceptor at the modules of the plan, outside all others."""
        inner = [rules for rules in self.rules if rules.module is not self.model]

        def handle(number: int, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.module_call(inner[number], call, args, kwargs)

        intercept_calls([rules.module for rules in inner], handle)

    @property
    def _own(self) -> ModuleRules | None:
        """Return the rules of the model itself."""
        return next((rules for rules in self.rules if rules.module is self.model), None)


def read_planned(model: nn.Module, attribute: str, attention: SequenceAttention) -> PlannedSequence:
    """Read the plan in an attribute of a model; nothing is changed before `install`. Raises InputError if the plan does
    not fit the model."""
    rules = read_plan(model, attribute, padding=attention.ring is None)
    return PlannedSequence(model, attention, attribute, rules)


def _difference(expected: Any, got: Any, bound: float) -> str | None:
    """Describe the difference between a result and the expected one, None if it is small."""
    a, b = tree_leaves(expected), tree_leaves(got)
    if len(a) != len(b):
        return f"it returns {len(b)} values instead of {len(a)}"
    for number, (x, y) in enumerate(zip(a, b, strict=True)):
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            continue
        if x.shape != y.shape:
            return f"output {number} has the shape {list(y.shape)} instead of {list(x.shape)}: it must be gathered"
        wide = torch.complex128 if x.is_complex() else torch.float64
        one, other = x.to(wide), y.to(wide)
        if not torch.equal(one.isnan(), other.isnan()):
            return f"padding, or what comes from it, reaches output {number}"
        error = float((one - other).nan_to_num().norm() / one.nan_to_num().norm().clamp_min(1e-30))
        if error > bound:
            return f"output {number} differs from that of the whole model by {error:.1e}, relatively"
    return None
