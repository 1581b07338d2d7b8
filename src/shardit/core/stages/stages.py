"""A transformer over the stages of a pipeline: what happens at a call of it."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from shardit.core.modules.blocks import drop_blocks, find_blocks
from shardit.core.modules.fingerprint import PROCESSOR
from shardit.core.modules.hints import Plan
from shardit.core.modules.module_state import State, differences, poison, restore, state_of
from shardit.core.modules.patching import BlockCalls, changing_methods, fixed_place, install, subclass_in_place
from shardit.core.placement.partition import Placement
from shardit.core.plans.course import DryCall
from shardit.core.plans.known_plans import KnownPlans
from shardit.core.plans.local_plan import LocalPlan
from shardit.core.plans.traced_call import TracedCall
from shardit.core.runtime import microbatch
from shardit.core.runtime.call_signature import asks_for_gradients, mode_key, signature
from shardit.core.runtime.pending import settle
from shardit.core.runtime.randomness import States, generators_kept, moved, set_states, states
from shardit.core.stages.first_call import own_containers, refuse_counters, refuse_draws, refuse_objects, same_bits
from shardit.core.stages.guidance import RemoteCall
from shardit.core.stages.runtime import Runtime
from shardit.core.stages.staged_call import StagedCall
from shardit.errors import RankError, UnsupportedError

log = logging.getLogger(__name__)

WARN_SIGNATURES = 16
"""Signatures after which a warning says that calls keep changing shape, which makes each first one slow."""


@dataclass
class Stages:
    """One transformer cut over the stages.

    owners[i]: stage of block i. ran[i]: how often this rank ran block i (never, if it is another's).
    """

    model: nn.Module
    runtime: Runtime
    blocks: list[tuple[str, nn.Module]]
    owners: list[int]
    known: KnownPlans = field(default_factory=KnownPlans)
    ran: Counter[int] = field(default_factory=Counter)
    traced: int = 0
    _block_calls: BlockCalls = field(default_factory=BlockCalls)
    _checked: set[Any] = field(default_factory=set)
    _splits: dict[Any, bool] = field(default_factory=dict)
    _attentions: list[dict[str, Any]] | None = None

    @property
    def plans(self) -> list[LocalPlan]:
        """The plans that are known, the one that was used last at the end."""
        return list(self.known.plans.values())

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the transformer: returns at once with pending tensors, except the first of each signature."""
        if self._block_calls.interceptor is not None:  # the forward calls the model itself
            return forward(*args, **kwargs)
        settle((args, kwargs))
        if asks_for_gradients((args, kwargs)):
            what = "stages and guidance ranks run without gradients; use torch.no_grad()"
            raise UnsupportedError(f"{self._name} is called for its gradients, but {what}")
        if not scales_adapters(kwargs):
            return self._micro_batches(forward, args, kwargs)
        # The scale multiplies the adapters' own in place for the length of the forward: nothing else may run in it.
        self.runtime.schedule.drain()
        out = self._micro_batches(forward, args, kwargs, exclusive=True)
        self.runtime.schedule.drain()
        return out

    def forget(self) -> None:
        """The model has been changed: all that is known of its calls is found again, on every rank."""
        self.known = KnownPlans()
        self._checked.clear()
        self._splits.clear()
        self._attentions = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Meanwhile a block call runs the block itself, wherever the forward is, and nothing is watched."""
        with self._block_calls.intercepted_by(None), without_modes():
            yield

    def watched(self, forward: Callable[[], Any], arguments: Any) -> Any:
        """The result of a forward that runs block by block on all stages at once, of which nothing is remembered. Only
        inside `aside`; collective over the stages."""
        call = TracedCall(self.model, self.blocks, self.owners, self.runtime.comm, lambda index: None)
        return call.run(self._block_calls, forward, arguments)[0]

    def _code(self) -> Any:
        """What of the model decides how it computes, besides its arguments: pipelines exchange attention processors in
        the middle of a call."""
        if self._attentions is None:
            self._attentions = [own for module in self.model.modules() if PROCESSOR in (own := vars(module))]
        return self.model.training, tuple(type(own.get(PROCESSOR)) for own in self._attentions)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _micro_batches(self, forward: Any, args: Any, kwargs: Any, exclusive: bool = False) -> Any:
        runtime = self.runtime
        samples = microbatch.batch_size(args, kwargs) if runtime.split_batch and not exclusive else 1
        dealt = runtime.guidance.parts(runtime.program, samples)
        parts = min(samples, dealt * -(-runtime.mesh.pp_size // runtime.max_in_flight))
        if parts == 1:
            return self._one(forward, args, kwargs)
        key = mode_key((args, kwargs), self._code()), microbatch.pattern(args, kwargs), parts
        if key not in self._splits:
            return self._try_split(key, forward, args, kwargs, parts)
        if not self._splits[key]:
            return self._one(forward, args, kwargs)
        outs = [self._one(forward, *piece) for piece in microbatch.split(args, kwargs, parts)]
        return microbatch.merge(outs)

    def _try_split(self, key: Any, forward: Any, args: Any, kwargs: Any, parts: int) -> Any:
        """Run a batched call whole and by sample, and keep splitting only if both give the same."""
        device = self.runtime.mesh.device
        before = states(device, [])
        whole = self._one(forward, *own_containers((args, kwargs)))
        settle(whole)
        merged, error = None, None
        try:
            if moved(before, states(device, [])):
                raise UnsupportedError("it draws random numbers")
            with generators_kept(device):
                merged = microbatch.merge([self._one(forward, *p) for p in microbatch.split(args, kwargs, parts)])
                settle(merged)
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as failure:  # a model that takes no such batch: it is kept whole
            error = failure
        close = error is None and microbatch.close(whole, merged)
        self._splits[key] = all(self.runtime.replica.gather_objects(close))
        if not self._splits[key] and self.runtime.mesh.rank == 0:
            log.warning("%s: a batch cannot be split by sample (%s); it stays whole", self._name, error or "it differs")
        # What is split later is split now, too: the same request gives the same bits however often it is run.
        return merged if self._splits[key] else whole

    def _one(self, forward: Any, args: Any, kwargs: Any) -> Any:
        arguments = (args, kwargs)
        key = signature(arguments, self._code())
        local = self.known.find(key, arguments) or self._same_course(key, forward, arguments)
        if local is None:
            return self._first(key, forward, args, kwargs)
        runtime = self.runtime
        replica = runtime.guidance.next(runtime.program)
        if replica == runtime.guidance.index:
            return self._start(local, lambda: forward(*args, **kwargs), arguments).result()
        call = RemoteCall(local.plan, runtime.route, replica, runtime.wait_for)
        runtime.schedule.start(call)
        return call.result()

    def _same_course(self, key: Any, forward: Any, arguments: Any) -> LocalPlan | None:
        """Of the plans of a signature whose course values decide, the one that holds for a call with other values.

        Collective over the replica: all ranks must find the same. Under "sp" other lengths are learned from real data.
        """
        candidates = self.known.of_signature(key)
        if not candidates:
            return None
        fits, read = [], set[int]()
        for local in candidates if "sp" not in self.runtime.mesh.axes else ():
            args, kwargs = own_containers(arguments)
            dry = DryCall(local.plan, self.runtime.mesh.device)
            if dry.fits(self._block_calls, lambda args=args, kwargs=kwargs: forward(*args, **kwargs), (args, kwargs)):
                fits, read = [local], dry.trace.deciding
                break
        found = [local.plan.digest() for local in fits]
        if any(other != found for other in self.runtime.replica.gather_objects(found)) or not fits:
            return None
        self.known.learn(key, arguments, read, fits[0])
        return fits[0]

    def _start(self, local: LocalPlan, forward: Any, arguments: Any, poison: bool = False) -> StagedCall:
        runtime = self.runtime
        route = runtime.route.of_one(runtime.guidance.index) if poison else runtime.route
        wait = runtime.turns.wait_for if poison else runtime.wait_for
        drew = functools.partial(runtime.agreement.drawing.add, self._name)
        call = StagedCall(
            local, runtime.comm, route, self._block_calls, forward, arguments, wait, self._count, drew, poison
        )
        runtime.schedule.start(call)
        return call

    def _first(self, key: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        """The first call of a signature: watched, block by block; then, for a new kind of call, checked."""
        arguments = (args, kwargs)
        again, device = own_containers(arguments), self.runtime.mesh.device
        before, kept = states(device, []), state_of(self.model)
        traced = TracedCall(self.model, self.blocks, self.owners, self.runtime.comm, self._count)
        self.traced += 1
        out, plan = traced.run(self._block_calls, lambda: forward(*args, **kwargs), arguments)
        after = states(device, [])
        refuse_objects(self._name, out)
        refuse_draws(self._name, self.runtime.mesh.sizes, before, traced.drawn, after)
        self._refuse_counters(kept, forward, own_containers(again), out)
        local = LocalPlan.of(plan, self.runtime.comm.rank)
        deciding = traced.trace.deciding
        mode = mode_key(again, self._code()), plan.course if deciding else None
        if mode not in self._checked and self.runtime.comm.size > 1:
            kept = [thing for thing in state_of(self.model) if thing.outside]
            self._self_check(local, forward, own_containers(again), out, before)
            restore(kept)
            set_states(moved(before, after), device, [])
            self._checked.add(mode)
        self.known.learn(key, again, deciding, local)
        if self.traced == WARN_SIGNATURES and self.runtime.mesh.rank == 0:
            log.warning(
                "%s: %d different signatures so far; the first call of each runs without overlap",
                self._name,
                self.traced,
            )
        return self.runtime.guidance.noticed(out, self.runtime.program)

    def _refuse_counters(self, before: State, forward: Any, arguments: Any, out: Any) -> None:
        """Raise UnsupportedError where the model keeps something that changes from call to call: the ranks make other
        calls each. What one call sets and the next leaves alike (a table, say) is harmless, and so is what hooks count
        or collect without reading it: that is NaN in a second call, which must give the same. Collective."""
        after, comm = state_of(self.model), self.runtime.comm
        changed = [differences(before, after, outside) for outside in (False, True)]
        if not any(any(of_rank) for of_rank in comm.gather_objects(changed)):
            return
        args, kwargs = arguments
        of_users = [thing for thing in after if thing.outside]
        poison(of_users, changed[1])
        try:
            with generators_kept(self.runtime.mesh.device), self.aside():
                again = self.watched(lambda: forward(*args, **kwargs), arguments)
            later = state_of(self.model)
            still = differences(after, later)
            counted = differences(after, later, outside=True) or changed[1]
            still += counted if not same_bits(out, again) else []
            if counted and not still and self.runtime.mesh.rank == 0:
                log.warning("%s: its calls change %s, but each rank makes a part of them", self._name, counted[0])
        except UnsupportedError:  # the same call takes another course, on every rank
            still = [*changed[0], *changed[1]]
        restore(of_users)
        refuse_counters(self._name, comm.gather_objects(still))

    def _self_check(self, local: LocalPlan, forward: Any, arguments: Any, expected: Any, drawn: States) -> None:
        """The same call again, pipelined, with NaN in every placeholder, from the same states of generators: it must
        give the same bits on every rank."""
        args, kwargs = arguments
        device = self.runtime.mesh.device
        now = states(device, [])
        set_states({name: drawn[name] for name in moved(drawn, now)}, device, [])
        call = self._start(local, lambda: forward(*args, **kwargs), arguments, poison=True)
        self.runtime.schedule.drain(call)
        got = call.result()
        call.settle()
        what = None if same_bits(expected, got) else "its result changes"
        if call.failure is not None:
            what = f"it fails ({type(call.failure).__name__}: {call.failure})"
        found = [text for text in self.runtime.comm.gather_objects(what) if text]
        if found:
            raise UnsupportedError(
                f"{self._name} cannot be cut at its block calls: with placeholders for the blocks of other stages "
                f"{max(found, key=len)}, so something that crosses a cut is neither an argument nor an output of a "
                "block"
            )

    def _count(self, index: int) -> None:
        self.ran[index] += 1


def scales_adapters(kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for another strength of its adapters than they were given."""
    return any(
        isinstance(value, dict) and value.get("scale", 1.0) != 1.0
        for name, value in kwargs.items()
        if name.endswith("attention_kwargs")
    )


def stage(
    model: nn.Module,
    runtime: Runtime,
    placement: Placement,
    plan: Plan | None = None,
    shared: Collection[int] = (),
) -> Stages:
    """Cut a transformer in place: keep the blocks of this rank, intercept the calls of all and of the model.
    `shared`: ids of the tensors that another component has, too; every rank keeps them."""
    blocks = find_blocks(model, plan)
    stages = Stages(model, runtime, blocks, placement.owners())
    drop_blocks(model, blocks, stages.owners, runtime.comm.rank, plan, shared)
    install(blocks, stages._block_calls)
    own_call = type(model).__call__

    @functools.wraps(own_call)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return stages.call(own_call.__get__(self), args, kwargs)

    def end() -> None:
        if stages._block_calls.interceptor is None:
            runtime.schedule.drain()

    members = {
        **changing_methods(type(model), end),
        "__call__": __call__,
        "device": property(lambda self: runtime.mesh.device),
        "to": fixed_place(type(model).to, runtime.mesh.device),
        "shardit_stages": property(lambda self: stages),
    }
    subclass_in_place(model, members)
    return stages
