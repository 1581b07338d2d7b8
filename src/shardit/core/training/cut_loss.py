"""A loss function over a model that is cut at its block calls: placement of blocks, plans of losses, steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.p2p import Comm
from shardit.core.modules.blocks import CutModel, drop_blocks
from shardit.core.modules.hints import Plan
from shardit.core.modules.state.buffers import buffers_kept
from shardit.core.plans.call_plan import segments_of
from shardit.core.runtime.flat_call import FlatCall, modes
from shardit.core.runtime.randomness import generators_kept, torch_states
from shardit.core.training.check import check_plan
from shardit.core.training.dry_loss import DryLoss
from shardit.core.training.first_gradients import Expected, compare_gradients, expected_gradients
from shardit.core.training.first_loss import WatchedLoss
from shardit.core.training.gradients.deferred import Deferred
from shardit.core.training.gradients.holdings import Holdings
from shardit.core.training.known_plans import KnownLossPlans
from shardit.core.training.liveness import Liveness
from shardit.core.training.loss_plan import LossPlan
from shardit.core.training.micro_batch import tree_of
from shardit.core.training.plain_calls import PlainCalls
from shardit.core.training.schedules import DEFERRING, Schedules, check_owners, owner_of_chunk
from shardit.core.training.segment import LossRun, StepData
from shardit.core.training.send_blocks import supply_blocks
from shardit.errors import UnsupportedError


@dataclass
class CutLoss:
    """A loss over the stages of one pipeline. The constructor and all methods are collective over them, but `holdings`.

    replica: all ranks of the stages, with their tensor ranks. place: gives the chunk of each block for an order of the
    blocks. compares: the first gradients, with those without a schedule. known: the schedules so far. settled: the
    order of the blocks may not change any more. dropped: each stage has its own blocks alone.
    """

    cut: CutModel
    loss: Callable[[Any, Any], torch.Tensor]
    comm: Comm
    replica: GroupCoordinator
    kind: str
    place: Callable[[Sequence[int]], list[int]]
    hints: Plan | None = None
    compares: bool = True
    chunk_of: list[int] = field(default_factory=list)
    settled: bool = False
    dropped: bool = False
    known: KnownLossPlans = field(default_factory=KnownLossPlans)
    run: LossRun = field(init=False)
    _held: Holdings | None = None
    _expected: Expected | None = None
    _checked: set[Any] = field(default_factory=set)
    _deferred: Deferred = field(default_factory=Deferred)

    def __post_init__(self) -> None:
        plain, device = PlainCalls(self.cut, self.comm), self.comm.group.device
        self.run = LossRun(self.cut, self.loss, device, self.comm.rank, plain)
        self._place(range(len(self.cut.blocks)))
        plain.whole = not supply_blocks(self.cut, self.comm)

    @property
    def holdings(self) -> Holdings:
        """The parameters of this stage. From now on the order of the blocks is settled."""
        self.settled = True
        if self._held is None:
            replicate = self.hints.replicate if self.hints else ()
            self._held = Holdings.of(self.cut, self.comm.rank, self.comm.size, replicate)
        return self._held

    def step(self, data: StepData) -> torch.Tensor:
        """Run forward and backward of all micro-batches; return the sum of the losses of this rank."""
        if self.comm.size == 1:
            return self._alone(data)
        parts: dict[int, tuple[Schedules, list[int]]] = {}
        for number, batch in enumerate(data.batches):
            schedules = self._schedules(batch, data.seeds[number])
            parts.setdefault(id(schedules), (schedules, []))[1].append(number)
            if schedules.plan.plain_calls:
                data.plain[number] = self._plain_results(batch, data.seeds[number])
        for schedules, numbers in parts.values():
            schedules.step(numbers, data)
        return _sum(data, self.comm.group.device)

    def prepare(self, batch: Any, seed: int) -> None:
        """Watch the loss of a micro-batch, if none of its kind was, and settle which stage has what."""
        if self.comm.size > 1:
            with generators_kept(self.comm.group.device):
                self._schedules(batch, seed)

    def _alone(self, data: StepData) -> torch.Tensor:
        for number, batch in enumerate(data.batches):
            loss = self.run.fresh(batch, data.seeds[number]) * data.factors[number]
            loss.backward()
            data.losses[number] = loss.detach().reshape(())
        return _sum(data, self.comm.group.device)

    def _plain_results(self, batch: Any, seed: int) -> list[Any]:
        return self.run.plain.collect(lambda: self.run.fresh(batch, seed))

    def _schedules(self, batch: Any, seed: int) -> Schedules:
        """Return the schedules of the losses like that of a micro-batch; watch it if it is the first one."""
        call = FlatCall.of((tree_of(batch),), {})
        key = call.signature(self.state())
        found = self.known.find(key, call.leaves)
        if found is not None:
            return found
        found, deciding = self._same_plan(key, batch, seed, call)
        if found is None:
            plan, deciding = self._watch(batch, seed, call)
            same = (one for one in self.known.schedules.values() if one.plan.digest() == plan.digest())
            found = next(same, None) or Schedules(self.run, plan, self.comm.group, self.kind, self._deferred)
            self._compare_gradients(found, batch, seed)
        self.known.learn(key, call.leaves, deciding, found)
        return found

    def _same_plan(self, key: Any, batch: Any, seed: int, call: FlatCall) -> tuple[Schedules | None, set[int]]:
        """Return known schedules that a loss with new contents follows, and the leaves that its plan depends on."""
        for schedules in self.known.of_signature(key):
            plan = schedules.plan
            dry = DryLoss(self.cut, plan, self.comm.group.device)
            with buffers_kept(self.cut.model):
                fits = not plan.plain_calls and dry.fits(
                    lambda: self.run.fresh(batch, seed), call, lambda trace, loss: self._plan(trace, loss, 0)
                )
            if all(self.comm.group.gather_objects(fits)):
                return schedules, dry.trace.deciding
        return None, set()

    def state(self) -> Any:
        """Return the state of the model and of torch on which a plan depends, the same on every stage."""
        model = self.cut.model
        every = model.named_parameters(remove_duplicate=False)  # tied ones are apart if a stage has none of them
        return bytes(m.training for m in model.modules()), bytes(p.requires_grad for _, p in every), modes()

    def _watch(self, batch: Any, seed: int, call: FlatCall) -> tuple[LossPlan, set[int]]:
        with buffers_kept(self.cut.model):
            watched = WatchedLoss(self.cut, self.comm)
            with self.run.plain.recorded(lambda: bool(watched.trace.sites)) as plain:
                loss = watched.watch_loss(lambda: self.run.fresh(batch, seed), call)
        self.run.updates |= watched.updates
        step = StepData([batch], [1.0], [seed], {0: plain})
        if self.compares and not self.dropped:
            self._expected = expected_gradients(self.run, self.comm, self.replica, step, watched)
        self._settle(watched)
        plan = self._plan(watched, watched.trace.number(loss), len(plain))
        if len(set(self.comm.group.gather_objects(plan.digest()))) > 1:
            raise UnsupportedError("ranks found different cuts: the loss does not do the same on every rank")
        crossing = tuple(item.address for cut in plan.cuts for item in cut)
        kind = call.mode_key(self.state()), tuple(site.block for site in plan.sites), crossing
        if kind not in self._checked:
            with buffers_kept(self.cut.model):
                check_plan(self.run, plan, self.comm, step, loss.detach())
            self._checked.add(kind)
        return plan, watched.trace.deciding

    def _compare_gradients(self, schedules: Schedules, batch: Any, seed: int) -> None:
        """Compare the gradients of the stages with those that are expected, if there are any."""
        expected, self._expected = self._expected, None
        if expected is not None:
            plain = {0: self._plain_results(batch, seed)} if schedules.plan.plain_calls else {}
            step = StepData([batch], [1.0], [seed], plain)
            compare_gradients(schedules, step, self.comm, self.replica, self.holdings, expected)

    def _settle(self, watched: WatchedLoss) -> None:
        """After the first watched loss: place blocks in the order in which they ran, release those of other stages."""
        trainable = [name for name in watched.outside if self._trainable(name)]
        known = self.hints.replicate if self.hints else ()
        outside = tuple(sorted(set(watched.outside) - set(known)))
        if outside and (self.dropped or (self._held is not None and trainable)):
            raise UnsupportedError(
                f"{outside[0]} is used outside its block, so all stages need it: give stages() a micro-batch in "
                f"example=, or name it in plan=Plan(replicate=({outside[0]!r},))"
            )
        if outside:
            self.hints = replace(self.hints or Plan(), replicate=(*known, *outside))
        if self.dropped:
            return
        ran = list(dict.fromkeys(site.block for site in watched.trace.sites))
        order = [*ran, *(n for n in range(len(self.cut.blocks)) if n not in ran)]
        before = list(self.cut.owners)
        self._place(order)
        if self.settled and self.cut.owners != before:
            first = self.cut.blocks[next(b for n, b in enumerate(order) if n != b)][0]
            raise UnsupportedError(
                f"blocks run in another order than they are registered in ({first} comes earlier), and parameters() "
                "was called before: give stages() a micro-batch in example=, or the order of the lists in plan="
            )
        self._held = self._held if self.settled and not outside else None
        self.settled = self.dropped = True
        supply_blocks(self.cut, self.comm)
        _ = self.holdings
        drop_blocks(self.cut.model, self.cut.blocks, self.cut.owners, self.comm.rank, self.hints)
        self.run.plain.whole = False
        own = (one for (_, one), owner in zip(self.cut.blocks, self.cut.owners, strict=True) if owner == self.comm.rank)
        for block in own if self.kind in DEFERRING else ():
            self._deferred.install(block)

    def _place(self, order: Sequence[int]) -> None:
        chunks = self.place(order)
        self.chunk_of = chunks
        self.cut.owners[:] = [owner_of_chunk(chunk, self.comm.size, self.kind) for chunk in chunks]

    def _trainable(self, name: str) -> bool:
        found = dict(self.cut.model.named_parameters(remove_duplicate=False)).get(name)
        return found is not None and found.requires_grad

    def _plan(self, watched: WatchedLoss | DryLoss, loss: int, plain_calls: int) -> LossPlan:
        trace, model = watched.trace, self.cut.model
        sites = tuple(replace(site, owner=self.cut.owners[site.block]) for site in trace.sites)
        chunks = [self.chunk_of[site.block] for site in sites]
        segments = segments_of(chunks)
        owners = tuple(self.cut.owners[sites[first].block] for first, _ in segments)
        check_owners(
            owners, self.comm.size, self.kind, [self.cut.blocks[sites[first].block][0] for first, _ in segments]
        )
        learning = {n for n, (_, b) in enumerate(self.cut.blocks) if any(p.requires_grad for p in b.parameters())}
        leaves = [p for p in model.parameters() if p.requires_grad and not p.is_meta and trace.knows(p)]
        grads = {trace.number(leaf) for leaf in leaves}
        learns = [site.block in learning for site in sites]
        cuts = Liveness(trace, segments, watched.layouts, learns, grads).cuts(loss)
        sizes = tuple(state.numel() for state in torch_states(self.comm.group.device))
        return LossPlan(sites, tuple(segments), owners, cuts, bool(watched.drawing), plain_calls, sizes)


def _sum(data: StepData, device: torch.device) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for loss in data.losses.values():
        total += loss.double()
    return total
