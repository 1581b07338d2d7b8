"""A transformer over the stages of a pipeline: what happens at a call of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from shardit.core.modules.block_calls import install
from shardit.core.modules.blocks import CutModel, blocks_named, drop_blocks, lacks_data
from shardit.core.modules.fingerprint import PROCESSOR
from shardit.core.modules.patching import changing_methods, fixed_device_to, subclass_in_place
from shardit.core.placement.assignment import Cut
from shardit.core.plans.dry_call import DryCall
from shardit.core.plans.known_plans import KnownPlans
from shardit.core.plans.local_plan import LocalPlan
from shardit.core.runtime import microbatch
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.stages.entry import Forward, ModelEntry
from shardit.core.stages.first_call import FirstCalls
from shardit.core.stages.guidance import RemoteCall
from shardit.core.stages.runtime import Runtime
from shardit.core.stages.split_calls import SplitCalls
from shardit.core.stages.staged_call import StagedCall
from shardit.core.stages.user_code import UserCode, scales_adapters


@dataclass
class TransformerStages:
    """One transformer cut over the stages. scales: how names of arguments end that give the strength of adapters; ""
    for none. users: code and adapters of users in it. known: the plans of its calls."""

    cut: CutModel
    runtime: Runtime
    scales: str = ""
    users: UserCode = field(default_factory=UserCode)
    known: KnownPlans = field(default_factory=KnownPlans)
    first: FirstCalls = field(init=False)
    _split: SplitCalls = field(init=False)
    _attentions: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.first = FirstCalls(self.cut, self.runtime)
        self._split = SplitCalls(self.cut.name, self.runtime, self.first, self._whole)

    @property
    def plans(self) -> list[LocalPlan]:
        """The plans that are known, the one that was used last at the end."""
        return list(self.known.plans.values())

    def call(self, forward: Forward, call: FlatCall) -> Any:
        """Make a call of the transformer: it returns at once with pending tensors, except the first of each
        signature."""
        runtime, code = self.runtime, self._code()
        exclusive = scales_adapters(call.kwargs, self.scales) or self.first.alone
        exclusive = exclusive or (self.users.may_change and not runtime.in_pipeline)
        # A hook may relate the samples of a batch; before each call of a pipeline this is found again (`relearn`).
        whole = exclusive or (self.users.runs and runtime.watches) or not runtime.split_batch
        samples = 1 if whole else microbatch.batch_size(call.args, call.kwargs)
        pieces = runtime.guidance.parts(runtime.program, samples)
        parts = min(samples, pieces * -(-runtime.mesh.pp_size // runtime.max_in_flight))
        if parts > 1:
            return self._split.run(forward, call, code, parts)
        if not exclusive:
            return self._whole(forward, call, code)
        # The scale multiplies the adapters' own in place for the length of the forward, it changes modules itself, or
        # a user's program may change the state of hooks and adapters after it: nothing else may run in it.
        runtime.schedule.drain()
        out = self._whole(forward, call, code)
        runtime.schedule.drain()
        return out

    def _whole(self, forward: Forward, call: FlatCall, code: Any) -> Any:
        runtime, key = self.runtime, call.signature(code)
        local = self.known.find(key, call.leaves) or self._same_plan(key, forward, call)
        if local is None:
            out, local, deciding = self.first.run(forward, call, code)
            self.known.learn(key, call.leaves, deciding, local)
            return runtime.guidance.mark_used(out, runtime.program)
        replica = runtime.guidance.next(runtime.program)
        if replica == runtime.guidance.index:
            flight = StagedCall(local, self.cut, runtime, forward, call)
        else:
            flight = RemoteCall(local.plan, runtime.route, replica, runtime.wait_for)
        runtime.schedule.start(flight)
        return flight.result()

    def _same_plan(self, key: Any, forward: Forward, call: FlatCall) -> LocalPlan | None:
        """Of the plans of a signature whose path values decide, the one that holds for a call with other values.

        Collective over the replica: all ranks must find the same. Under "sp" other lengths are learned from real data.
        """
        candidates = self.known.of_signature(key)
        if not candidates:
            return None
        fits, read = [], set[int]()
        for local in candidates if "sp" not in self.runtime.mesh.axes else ():
            dry = DryCall(local.plan, self.runtime.mesh.device)
            if dry.fits(self.cut.calls, forward, call.again()):
                fits, read = [local], dry.trace.deciding
                break
        found = [local.plan.digest() for local in fits]
        if any(other != found for other in self.runtime.replica.group.gather_objects(found)) or not fits:
            return None
        self.known.learn(key, call.leaves, read, fits[0])
        return fits[0]

    def forget(self) -> None:
        """The model has been changed: all that is known of its calls is found again, on every rank."""
        self.known = KnownPlans()
        self.first.checked.clear()
        self.first.alone = False
        self._split.forget()
        self._attentions = None

    def relearn(self, runs: bool, adapted: bool) -> None:
        """Before a call of the pipeline, or of the model alone: note code and adapters of users. With code of users
        whether batches can be split is found again, as this may depend on its variables."""
        self.users = UserCode(runs, adapted)
        if runs:
            self._split.forget()

    def _code(self) -> Any:
        """Return the parts of the model that affect a call. Pipelines exchange attention processors in the middle of a
        call."""
        if self._attentions is None:
            self._attentions = [own for module in self.cut.model.modules() if PROCESSOR in (own := vars(module))]
        return self.cut.model.training, tuple(type(own.get(PROCESSOR)) for own in self._attentions)


def stage(
    model: nn.Module, runtime: Runtime, cut: Cut, shared: Collection[int] = (), scales: str = ""
) -> TransformerStages:
    """Cut a transformer in place: keep the blocks of this rank, intercept the calls of all and of the model.
    `shared`: ids of tensors of other components, too, which every rank keeps. `scales`: see TransformerStages."""
    cut_model = CutModel(model, blocks_named(model, cut.blocks, cut.plan), cut.placement.owners())
    stages = TransformerStages(cut_model, runtime, scales)
    drop_blocks(model, cut_model.blocks, cut_model.owners, runtime.comm.rank, cut.plan, shared)
    others = [number for number, owner in enumerate(cut_model.owners) if owner != runtime.comm.rank]
    install(cut_model.blocks, cut_model.calls, [number for number in others if lacks_data(cut_model.blocks[number][1])])
    ModelEntry(model, stages.call)

    def end() -> None:
        if cut_model.calls.interceptor is None:
            runtime.schedule.drain()

    members = {
        **changing_methods(type(model), end),
        "device": property(lambda self: runtime.mesh.device),
        "to": fixed_device_to(type(model).to, runtime.mesh.device),
        "shardit_stages": property(lambda self: stages),
    }
    subclass_in_place(model, members)
    return stages
