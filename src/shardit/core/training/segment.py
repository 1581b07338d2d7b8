"""One segment of a loss as a stage of torch's pipelines: the unmodified loss function with placeholders for the blocks
of other stages, and received tensors in the place of what earlier stages have computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.modules.blocks import CutModel
from shardit.core.modules.state.buffers import buffers_kept, modules_of_blocks
from shardit.core.plans.call_plan import Address, Leaf, Site
from shardit.core.runtime.randomness import seed_all, set_torch_states, torch_states
from shardit.core.training.loss_plan import LossPlan
from shardit.core.training.plain_calls import PlainCalls
from shardit.errors import RankError


class _StopSegment(BaseException):
    """Leaves a forward after the last block of a segment. Not an Exception: models may catch those."""


@dataclass
class StepData:
    """The micro-batches of one step, with their factors in the loss, their seeds and the results of their calls without
    gradients. losses: the loss of each micro-batch times its factor, on the last stage."""

    batches: list[Any]
    factors: list[float]
    seeds: list[int]
    plain: dict[int, list[Any]] = field(default_factory=dict)
    losses: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class LossRun:
    """A loss function over a cut model, and the step that runs at present. updates: code before the first block updates
    buffers."""

    cut: CutModel
    loss: Callable[[Any, Any], torch.Tensor]
    device: torch.device
    rank: int
    plain: PlainCalls
    step: StepData | None = None
    updates: bool = False

    def call(self, number: int) -> torch.Tensor:
        """Run the loss of one micro-batch of the step with its own random numbers."""
        assert self.step is not None
        return self.fresh(self.step.batches[number], self.step.seeds[number])

    def fresh(self, batch: Any, seed: int) -> torch.Tensor:
        """Run the loss with the random numbers of a seed, on lists and dicts of its own: a forward may empty them."""
        seed_all(seed)
        leaves, spec = tree_flatten(batch)
        return self.loss(self.cut.model, tree_unflatten(leaves, spec))


class Segment(nn.Module):
    """Segment number `number` of the losses of one plan. blank: the content of placeholders; zeros, since a NaN
    times zero is a NaN in a backward. only: the block call whose placeholders have it, others have zeros; None: all."""

    def __init__(self, run: LossRun, plan: LossPlan, number: int, blank: float = 0.0, only: int | None = None):
        super().__init__()
        self.blank, self.only = blank, only
        self.run, self.plan, self.number = run, plan, number
        self.first, self.last = plan.segments[number]
        self.into = plan.cuts[number - 1] if number else ()
        self.onward = plan.cuts[number] if number < len(plan.cuts) else None
        self._kept = {item.address for item in self.into if item.late} | {item.address for item in self.onward or ()}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return none: the schedule must neither move nor scale them."""
        return iter(())

    def forward(self, *received: torch.Tensor, index: torch.Tensor) -> Any:
        """Run the segment for one micro-batch; return what crosses the next cut, or the loss."""
        run, step = self.run, self.run.step
        assert step is not None
        micro_batch = int(index)
        tensors, self._states = received[: len(self.into)], received[len(self.into) :]
        self._given = {item.address: item.unpack(one) for item, one in zip(self.into, tensors, strict=False)}
        self._early = {item.address for item in self.into if not item.late}
        self._handles: dict[Address, torch.Tensor] = {}
        self._site, self._out = 0, None
        try:
            with (
                self._counted(),
                run.cut.calls.intercepted_by(self),
                run.plain.replayed(step.plain.get(micro_batch, [])),
            ):
                loss = run.call(micro_batch)
            if self.onward is not None or self._site != len(self.plan.sites):
                raise self._other_path("it ended early")
            loss = loss.reshape(()) * step.factors[micro_batch]
            step.losses[micro_batch] = loss.detach()
            return loss
        except _StopSegment:
            return self._out
        finally:
            self._given, self._handles, self._out, self._states = {}, {}, None, ()

    def _counted(self) -> AbstractContextManager[None]:
        """Let the first segment of a stage alone update buffers outside of blocks: all run the code before them."""
        first = self.plan.owners.index(self.plan.owners[self.number])
        if not self.run.updates or self.number == first:
            return nullcontext()
        return buffers_kept(self.run.cut.model, modules_of_blocks(self.run.cut))

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an own block; return placeholders or received tensors for a block of an earlier stage."""
        if self._out is not None:
            raise _StopSegment
        number, self._site = self._site, self._site + 1
        given = tree_flatten((args, kwargs))[0]
        site = self._check(number, index, given)
        self._note(number, "arg", given)
        if number < self.first:
            leaves = self._stand_ins(number, site, given)
            self._note(number, "out", leaves)
            if number == self.first - 1:
                self._place()
            return tree_unflatten(leaves, site.spec)
        with self.run.cut.calls.intercepted_by(None):
            out = call(*args, **kwargs)
        self.run.cut.ran[index] += 1
        self._note(number, "out", tree_flatten(out)[0])
        if number == self.last and self.onward is not None:
            # The forward is left at the next block call, since here it may be inside a checkpointed function.
            states = torch_states(self.run.device) if self.plan.draws else []
            tensors = (item.pack(self._handles[item.address]) for item in self.onward)
            self._out = (*tensors, *(state.to(self.run.device) for state in states))
        return out

    def _check(self, number: int, index: int, given: list[Any]) -> Site:
        """Return the watched call site. Raises RankError if this call differs from it."""
        site = self.plan.sites[number] if number < len(self.plan.sites) else None
        if site is None or site.block != index or len(site.given) != len(given):
            raise self._other_path(f"block call {number} is of block {self.run.cut.blocks[index][0]}")
        for leaf, known in zip(given, site.given, strict=True):
            if isinstance(leaf, torch.Tensor) and (leaf.dtype, tuple(leaf.shape)) != known[:2]:
                raise self._other_path(f"block call {number} gets {leaf.dtype} of shape {tuple(leaf.shape)}")
        return site

    def _other_path(self, what: str) -> RankError:
        return RankError(
            self.run.rank, f"a loss takes another path than the first one with a micro-batch of the same kind: {what}"
        )

    def _note(self, site: int, kind: str, leaves: list[Any]) -> None:
        for number, leaf in enumerate(leaves):
            address = Address(site, kind, number)
            if address in self._kept:
                self._handles[address] = leaf

    def _stand_ins(self, number: int, site: Site, given: list[Any]) -> list[Any]:
        """Return the output leaves of a block of an earlier stage."""
        leaves: list[Any] = []
        alike: dict[Any, torch.Tensor] = {}  # a block may return one tensor twice
        for place, leaf in enumerate(site.leaves):
            address, shape = Address(number, "out", place), (leaf.storage, leaf.offset, leaf.size, leaf.stride)
            if leaf.kind == "value":
                leaves.append(leaf.value)
            elif leaf.kind == "arg":
                leaves.append(_of_argument(leaf, given[leaf.arg]))
            elif address in self._early and address in self._given:
                leaves.append(alike.setdefault(shape, self._given[address]))
            elif shape in alike:
                leaves.append(alike[shape])
            else:
                leaves.append(alike.setdefault(shape, self._blank(number, leaf)))
        return leaves

    def _blank(self, site: int, leaf: Leaf) -> torch.Tensor:
        assert leaf.dtype is not None
        blank = torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype, device=self.run.device)
        wanted = leaf.dtype.is_floating_point and self.only in (None, site)
        return blank.fill_(self.blank) if wanted else blank.zero_()

    def _place(self) -> None:
        """At the cut: write late tensors over the content of the tensors at their addresses, set the generators."""
        for item in self.into:
            if item.late:
                place_over(self._handles[item.address], self._given[item.address])
        if self._states:
            set_torch_states([state.detach().cpu() for state in self._states], self.run.device)


def _of_argument(leaf: Leaf, base: torch.Tensor) -> torch.Tensor:
    """Return an output that is an argument, or a view of one."""
    if leaf.same:
        return base
    offset = base.storage_offset() + leaf.offset // base.element_size()
    return base.as_strided(leaf.size, leaf.stride, offset)


def place_over(tensor: torch.Tensor, content: torch.Tensor) -> None:
    """Replace the content of a tensor, and what it was computed from, in place."""
    if tensor.grad_fn is not None and not tensor._is_view():
        tensor.detach_()
    tensor.copy_(content)
