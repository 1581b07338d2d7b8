"""First calls: traced block by block, and of a new kind of call checked, on all stages at once.

A forward must not depend on things that other ranks do not have.
"""

from __future__ import annotations

import enum
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from shardit.core.modules.blocks import CutModel
from shardit.core.modules.state.module_state import (
    State,
    differences,
    late_changes,
    poison,
    restore,
    state_of,
    unversioned_writes,
)
from shardit.core.modules.state.tables import Table, tables
from shardit.core.modules.transient import TransientChanges
from shardit.core.plans.local_plan import LocalPlan
from shardit.core.plans.traced_call import TracedCall
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.runtime.randomness import States, generators_kept, moved, set_states, states
from shardit.core.runtime.versions import value_bytes
from shardit.core.stages.runtime import Runtime
from shardit.core.stages.staged_call import StagedCall
from shardit.errors import UnsupportedError

log = logging.getLogger(__name__)

WARN_SIGNATURES = 16
"""Signatures after which a warning reports calls that keep changing shape: each first one is slow."""


@dataclass
class FirstCalls:
    """The first calls of one transformer over the stages. All methods are collective over them.

    traced: how many there were. checked: the kinds of calls that were compared with a pipelined one. alone:
    whether a call changes modules for its own length, so that no other may be in flight. left: what the model kept
    after the last of them, until the pipeline's call has ended. tables: names of tensors that each call sets again.
    """

    cut: CutModel
    runtime: Runtime
    traced: int = 0
    checked: set[Any] = field(default_factory=set)
    alone: bool = False
    left: State | None = None
    tables: set[str] = field(default_factory=set)

    def run(self, forward: Callable[..., Any], call: FlatCall, code: Any) -> tuple[Any, LocalPlan, set[int]]:
        """Return the result of a call, the plan of those that follow, and the leaves of its arguments whose values
        decide."""
        name, device = self.cut.name, self.runtime.mesh.device
        before, kept = states(device, []), self._state(call)
        transient = TransientChanges(lambda: self._state(call), self.cut.model, kept)
        traced = TracedCall(self.cut, self.runtime.comm, transient.sample)
        self.traced += 1
        out, plan = traced.run(forward, call)
        after = states(device, [])
        refuse_objects(name, out)
        refuse_draws(name, self.runtime.mesh.sizes, before, traced.drawn, after)
        self._refuse_counters(kept, forward, call.again(), out, transient)
        self.left = self._state(call)
        self.cut.generators = self.left.generators()
        local, deciding = LocalPlan.of(plan, self.runtime.comm.rank), traced.trace.deciding
        mode = call.mode_key(code), plan.path if deciding else None
        if mode not in self.checked and self.runtime.comm.size > 1:
            self._self_check(local, forward, call.again(), out, before)
            restore(self.left.outside())
            set_states(moved(before, after), device, [])
            self.checked.add(mode)
        if self.traced == WARN_SIGNATURES and self.runtime.mesh.rank == 0:
            text = "%s: %d different signatures so far; the first call of each runs without overlap"
            log.warning(text, name, self.traced)
        return out, local, deciding

    def end(self) -> None:
        """At the end of a pipeline's call: warn if calls after the first ones have changed something."""
        left, self.left = self.left, None
        late = late_changes(left, state_of(self.cut.model)) if left is not None else []
        late = [name for name in late if name not in self.tables]
        if late:
            text = "%s: calls after the first ones change %s, and each rank makes a part of them: compare with one rank"
            log.warning(text, self.cut.name, late[0])

    def watched(self, forward: Callable[[], Any], arguments: Any, hook: Callable[[], None] = lambda: None) -> Any:
        """Return the result of a forward that runs block by block on all stages at once, of which nothing is
        remembered. Only inside `CutModel.untraced`. hook: called at the first block of each stage."""
        uncounted = TracedCall(replace(self.cut, ran=Counter()), self.runtime.comm, hook)
        return uncounted.run(lambda *_: forward(), FlatCall.of((arguments,), {}))[0]

    def _note_transient(self, names: list[list[str]]) -> None:
        """Note that calls run one after the other. names: the changes that each rank found in the middle of a call."""
        found = [name for of_rank in names for name in of_rank]
        if found and not self.alone and self.runtime.mesh.rank == 0:
            text = "%s changes %s for the length of a call: its calls run one after the other"
            log.warning(text, self.cut.name, found[0])
        self.alone = self.alone or bool(found)

    def _refuse_counters(
        self, before: State, forward: Callable[..., Any], call: FlatCall, out: Any, transient: TransientChanges
    ) -> None:
        """Raise UnsupportedError if the model keeps something that changes from call to call: the ranks make other
        calls each. What one call sets and the next leaves alike (a table, say) is harmless, and so is what hooks count
        or collect without reading it: that is NaN in a second call, which must give the same. So are tables."""
        comm, after = self.runtime.comm, self._state(call)
        changed = [differences(before, after, outside) for outside in (False, True)]
        gathered = comm.group.gather_objects((any(changed), transient.found(after)))
        self._note_transient([names for _, names in gathered])
        if not any(differ for differ, _ in gathered):
            return
        poison(before, after)
        renewed: dict[str, Table] = {}
        try:
            with generators_kept(self.runtime.mesh.device), self.cut.untraced():
                again = self.watched(lambda: forward(*call.args, **call.kwargs), (call.args, call.kwargs))
            later = self._state(call)
            still = differences(after, later, rewritten=True) + unversioned_writes(before, after)
            still += changed[1] if not same_bits(out, again) else []
            renewed = tables(after, later, {part for _, block in self.cut.blocks for part in block.modules()})
        except UnsupportedError:  # the same call takes another path, on every rank
            still = [*changed[0], *changed[1]]
        restore(after.outside())
        found = comm.group.gather_objects((still, changed[1], [*renewed]))
        names = [of_rank for of_rank, _, _ in found]
        if any(names) and all({*of_rank} <= {*known} for of_rank, _, known in found):
            names = comm.group.gather_objects(self._read_early(forward, call.again(), out, renewed))
            self.tables.update(renewed)
            restore(after.outside())
        refuse_counters(self.cut.name, names)
        counted = [name for _, of_rank, _ in found for name in of_rank]
        if counted and self.runtime.mesh.rank == 0:
            log.warning("%s: its calls change %s, but each rank makes a part of them", self.cut.name, counted[0])

    def _read_early(
        self, forward: Callable[..., Any], call: FlatCall, out: Any, renewed: Mapping[str, Table]
    ) -> list[str]:
        """Return the names of tables if a call reads them before it sets them, or sets them after its first block,
        which other stages do not reach: then they are state. Collective; found with NaN in their place."""
        unset: list[str] = []
        for table in renewed.values():
            table.put(table.nan)
        try:
            with generators_kept(self.runtime.mesh.device), self.cut.untraced():
                again = self.watched(
                    lambda: forward(*call.args, **call.kwargs),
                    (call.args, call.kwargs),
                    lambda: unset.extend(name for name, table in renewed.items() if table.is_unset),
                )
        except UnsupportedError:  # it takes another path, on every rank
            return [*renewed]
        finally:
            for table in renewed.values():
                if table.is_unset:
                    table.put(table.tensor)
        return unset if same_bits(out, again) else [*renewed]

    def _state(self, call: FlatCall) -> State:
        """Return the state of the model, and of the objects among its arguments."""
        return state_of(self.cut.model, [leaf for leaf in call.leaves if not isinstance(leaf, torch.Tensor)])

    def _self_check(
        self, local: LocalPlan, forward: Callable[..., Any], call: FlatCall, expected: Any, drawn: States
    ) -> None:
        """The same call again, pipelined, with NaN in every placeholder, from the same states of generators: it must
        give the same bits on every rank."""
        device = self.runtime.mesh.device
        now = states(device, [])
        set_states({name: drawn[name] for name in moved(drawn, now)}, device, [])
        flight = StagedCall(local, self.cut, self.runtime, forward, call, poison=True)
        self.runtime.schedule.start(flight)
        self.runtime.schedule.drain(flight)
        got = flight.result()
        flight.materialize()
        what = None if same_bits(expected, got) else "its result changes"
        if flight.failure is not None:
            what = f"it fails ({type(flight.failure).__name__}: {flight.failure})"
        found = [text for text in self.runtime.comm.group.gather_objects(what) if text]
        if found:
            raise UnsupportedError(
                f"{self.cut.name} cannot be cut at its block calls: with placeholders for the blocks of other stages "
                f"{max(found, key=len)}, so something that crosses a cut is neither an argument nor an output of a "
                "block"
            )


def refuse_draws(name: str, sizes: Mapping[str, int], before: States, first: States, after: States) -> None:
    """Raise UnsupportedError if a forward draws random numbers that other ranks do not: they run other branches,
    or leave the forward after their last block. `first`: the generators at the first block call."""
    if sizes["cfg"] > 1 and moved(before, after):
        axis, why = "cfg", "each guidance rank runs other branches"
    elif sizes["pp"] > 1 and moved(first, after):
        axis, why = "pipeline", "stages leave it after their last block"
    else:
        return
    raise UnsupportedError(
        f"{name} draws random numbers in its forward, and {why}: call .eval() on it, take away what draws (a hook, "
        f"say), or use {axis}_parallel_size=1"
    )


def refuse_counters(name: str, found: list[list[str]]) -> None:
    """Raise UnsupportedError if a call changes something each time that later calls depend on. found: the names that
    each rank found."""
    names = [one for of_rank in found for one in of_rank]
    if names:
        raise UnsupportedError(
            f"{name} changes {names[0]} in each of its calls, of which stages and guidance ranks run a part: "
            "use pipeline_parallel_size=1 and cfg_parallel_size=1 (slices and sharded tokens keep it right)"
        )


VALUES = (torch.Tensor, str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, enum.Enum)
"""Allowed types in a result: a later call returns the values of the first one, and its own tensors."""


def object_in(out: Any) -> str | None:
    """Return the class of an object in the result of a forward that may hold state, as a cache does."""
    found = (leaf for leaf in tree_leaves(out) if not isinstance(leaf, VALUES))
    return next((type(leaf).__name__ for leaf in found), None)


def refuse_objects(name: str, out: Any) -> None:
    """Raise UnsupportedError if a forward returns an object: each rank would fill a part of one of its own."""
    found = object_in(out)
    if found is not None:
        raise UnsupportedError(
            f"{name} returns a {found}, of which each rank would fill a part: use pipeline_parallel_size=1 and "
            "cfg_parallel_size=1"
        )


def same_bits(expected: Any, got: Any) -> bool:
    """Return whether two results have the same structure and their tensors the same bits."""
    a, b = tree_leaves(expected), tree_leaves(got)
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(x: Any, y: Any) -> bool:
    if not isinstance(x, torch.Tensor):
        return not isinstance(y, torch.Tensor)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(value_bytes(x), value_bytes(y))
