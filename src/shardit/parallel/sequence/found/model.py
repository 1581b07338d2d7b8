"""Sequence parallelism of one transformer: each rank of "sp" runs the blocks on its own tokens.

The arguments of a block call are cut. Its outputs look whole and are gathered only when code between or after the
blocks uses them: tensors passed from block to block never are. Code of the model sees whole tensors everywhere. The
token dimensions are found, and checked, at the first call of each kind (`search.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from shardit.core.comm.barrier import sendable
from shardit.core.modules.block_calls import intercept_calls
from shardit.core.modules.compiled import uncompiled
from shardit.core.modules.fingerprint import PROCESSOR
from shardit.core.modules.state.module_state import copy_aliases, new_values, restore, state_of
from shardit.core.runtime.flat_call import modes
from shardit.core.runtime.numbers_seen import NumbersSeen, floats_in
from shardit.core.runtime.pending import PendingTensor, materialize, materialize_leaves
from shardit.core.runtime.randomness import generators_kept
from shardit.core.stages.transformer_stages import TransformerStages
from shardit.errors import RankError, UnsupportedError
from shardit.parallel.attention.block_attention import BlockAttention, in_step
from shardit.parallel.attention.hook import intercept_attention
from shardit.parallel.attention.sequence_attention import SequenceAttention
from shardit.parallel.block_signature import fingerprint, value_key
from shardit.parallel.sequence.found.block_step import MAX_STEPS, BlockStep
from shardit.parallel.sequence.found.flow import Flow
from shardit.parallel.sequence.found.search import REMEDY, BlockPlan, NoShardingFound, find_plan
from shardit.parallel.sequence.found.small_lists import ListWork, only_if_small
from shardit.parallel.sequence.partitioned.modules import intercept
from shardit.parallel.sequence.partitioned.run import (
    PartitionedBlock,
    PartitionedCall,
    PartitionedRows,
    intercept_operations,
    rows_by_module,
)
from shardit.parallel.sequence.partitioned.search import WORTH, describe, find_partition
from shardit.parallel.sequence.shards.lazy import ShardCache, ShardSource, batches, full_shape, shard_source
from shardit.parallel.sequence.shards.token_dims import Shape

log = logging.getLogger(__name__)


_flow: ContextVar[Flow | None] = ContextVar("shardit_flow", default=None)


@dataclass
class SequenceParallel:
    """One transformer whose tokens are sharded over "sp".

    checked: block calls that were compared with the whole block (one for each kind). may_partition: whether a block
    whose tokens cannot be split is partitioned by operations; if not, only a small list is (`small_lists.py`).
    """

    model: nn.Module
    attention: SequenceAttention
    blocks: list[tuple[str, nn.Module]]
    stages: TransformerStages | None = None
    may_partition: bool = False
    checked: int = 0
    by_hand = False
    _fingerprints: list[Any] = field(default_factory=list)
    _attentions: list[list[dict[str, Any]]] = field(default_factory=list)
    _owned: list[bool] = field(default_factory=list)
    _plans: dict[Any, list[tuple[BlockPlan, Any]]] = field(default_factory=dict)
    _partitioned: dict[Any, PartitionedBlock] = field(default_factory=dict)
    _rows: dict[int, tuple[PartitionedBlock, PartitionedRows]] = field(default_factory=dict)
    _noted: set[str] = field(default_factory=set)
    _steps: dict[Any, BlockStep] = field(default_factory=dict)
    _numbers: NumbersSeen = field(default_factory=NumbersSeen)

    # Calls of the model and of a block.

    def forward(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the transformer; its result is plain and the same on all ranks."""
        running = _flow.get()
        if running is not None and running.owner is self:  # the forward calls the model itself
            return call(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        materialize_leaves(leaves)
        flow = Flow(self, ShardCache(self.attention.sp), self._numbers.kind(floats_in(leaves)))
        token = _flow.set(flow)
        try:
            with torch.no_grad():
                out = tree_map(flow.whole, call(*args, **kwargs))  # hooks on blocks may have put parts into it
            materialize(out)
            for name, kind in flow.work.settled():
                self._note(name, logging.INFO, describe(kind, kind.unless_small))
            return out
        except Exception:
            if flow.work.doubtful:
                self._forget_kinds(flow.work.doubtful)
            raise
        finally:
            _flow.reset(token)

    def block_call(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of block number `index`, on the tokens of this rank."""
        flow = _flow.get()
        if flow is None or flow.owner is not self or flow.in_block:
            return call(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        step = self._step(flow, index, call, leaves, spec)
        flow.work.add(self.blocks[index][0], step.multiplications)
        if step.plan is None:
            materialize(leaves)
            return self._run_whole(index, step, lambda: call(*args, **kwargs))
        args, kwargs = tree_unflatten(self._shards(flow, step, leaves), spec)
        flow.in_block = True
        try:
            out = self._run(index, step, lambda: call(*args, **kwargs))
        finally:
            flow.in_block = False
        return self._lazily_whole(flow, step, out)

    def _shards(self, flow: Flow, step: BlockStep, leaves: list[Any]) -> list[Any]:
        assert step.plan is not None
        candidate, shards = step.plan.candidate, []
        for q, (leaf, split) in enumerate(zip(leaves, candidate.splits, strict=True)):
            if split is not None:
                shard = flow.cache.shard_of(leaf, split, step.totals, keep=q not in candidate.streams)
                if q in candidate.streams:
                    flow.note(shard, split, step.totals, tuple(leaf.shape))
                leaf = shard
            elif isinstance(leaf, PendingTensor):
                materialize(leaf)
            shards.append(leaf)
        return shards

    def _run(self, index: int, step: BlockStep, call: Callable[[], Any]) -> Any:
        assert step.plan is not None
        if not self._owned[index]:  # another stage runs it
            return call()
        run = BlockAttention(self.attention, list(step.plan.sharded), step.layouts)
        if step.layouts is not None:
            with intercept_attention(run):
                return call()
        out = in_step(run, call, self._title(index), REMEDY)
        if not step.plan.by_values:
            step.layouts = run.new_layouts
        return out

    def _run_whole(self, index: int, step: BlockStep, call: Callable[[], Any]) -> Any:
        flow = _flow.get()
        if step.partitioned is None or not self._owned[index] or flow is None:
            return call()
        known = self._rows.get(index)
        if known is None or known[0] is not step.partitioned:
            intercept(self.blocks[index][1])
            known = self._rows[index] = step.partitioned, rows_by_module(self.blocks[index][1], step.partitioned)
        flow.in_block = True
        try:
            with intercept_operations(PartitionedCall(self.attention.sp, known[1])):
                return call()
        finally:
            flow.in_block = False

    def _lazily_whole(self, flow: Flow, step: BlockStep, out: Any) -> Any:
        assert step.plan is not None
        leaves, spec = tree_flatten(out)
        if len(leaves) != len(step.plan.outs):
            raise UnsupportedError(f"a block of {self._name} returns something else than in the first call of its kind")
        for q, split in enumerate(step.plan.outs):
            if split is not None:
                shape = tuple(leaves[q].shape)
                full = (*shape[: split.dim], sum(step.totals[p] for p in split.parts), *shape[split.dim + 1 :])
                flow.note(leaves[q], split, step.totals, full)
                leaves[q] = ShardSource(leaves[q], split, step.totals, full, self.attention.sp).whole()
        return tree_unflatten(leaves, spec)

    # Kinds of block calls.

    def _step(self, flow: Flow, index: int, call: Callable[..., Any], leaves: list[Any], spec: Any) -> BlockStep:
        shapes = [full_shape(leaf) for leaf in leaves]
        processors = tuple(type(own.get(PROCESSOR)) for own in self._attentions[index])
        kind = (self._fingerprints[index], processors, spec, tuple(map(value_key, leaves)), flow.numbers, modes())
        key = (kind, tuple(shapes))
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= MAX_STEPS:
                self._steps.clear()
            plan, partition_kind = self._known(kind, shapes), (kind, batches(shapes))
            if plan is None and partition_kind not in self._partitioned:
                plan = self._find(flow.work, kind, index, call, leaves, spec, shapes)
            if plan is None:
                partitioned = self._partitioned.get(partition_kind)
                step = BlockStep(None, partitioned, multiplications=partitioned.multiplications if partitioned else 0)
            else:
                totals = plan.candidate.totals(shapes)
                step = BlockStep(plan, None, totals, None, plan.multiplications * sum(totals) // plan.tokens)
            self._steps[key] = step
        return step

    def _known(self, kind: Any, shapes: list[Shape | None]) -> BlockPlan | None:
        for plan, pattern in self._plans.get(kind, ()):
            if plan.candidate.fits(shapes) and plan.candidate.pattern(shapes) == pattern:
                long_enough = max(plan.candidate.totals(shapes)) >= self.attention.sp.size
                return plan if long_enough else None
        return None

    def _find(
        self,
        work: ListWork,
        kind: Any,
        index: int,
        call: Callable[..., Any],
        leaves: list[Any],
        spec: Any,
        shapes: list[Shape | None],
    ) -> BlockPlan | None:
        plan: BlockPlan | PartitionedBlock | None = None
        error = None
        self.checked += 1
        materialize([leaf for leaf in leaves if shard_source(leaf) is None])
        # Sharded tensors stay sharded here: an untraced gather would be missing later.
        with self._untraced(), uncompiled(self.blocks[index][1]):
            whole = [leaf if source is None else source.peek() for leaf in leaves for source in [shard_source(leaf)]]
            if self._owned[index]:
                try:
                    plan = self._try(index, call, whole, spec)
                except RankError:
                    raise
                except Exception as failure:  # sent to every rank of the model
                    error = failure
            if self.stages is not None:
                comm, owner = self.stages.runtime.comm, self.stages.cut.owners[index]
                plan, error = comm.group.broadcast_object((plan, error and sendable(error)), owner)
        if error is not None:
            raise error
        if isinstance(plan, PartitionedBlock):
            self._partitioned[kind, batches(shapes)] = plan
            if plan.unless_small is not None:
                work.doubtful[kind, batches(shapes)] = self.blocks[index][0], plan
            return None
        if plan is not None and not plan.by_values:  # such a block may call attention once for each sample
            self._plans.setdefault(kind, []).append((plan, plan.candidate.pattern(shapes)))
        return plan

    def _try(
        self, index: int, call: Callable[..., Any], leaves: list[Any], spec: Any
    ) -> BlockPlan | PartitionedBlock | None:
        """Find the plan of a block call by trial, from the same state and random numbers in each."""
        name, block = self.blocks[index]
        kept = state_of(block)

        def run(*args: Any, **kwargs: Any) -> Any:
            restore(kept)  # so that all trials start equal
            out = call(*args, **kwargs)
            return copy_aliases(kept, out), new_values(kept, state_of(block))

        # In a context of its own: code that collects outputs of blocks (transformers does, by hooks) is not to collect
        # those of trials.
        trial = Context().run
        with generators_kept(self.attention.sp.group.device):
            try:
                plan = trial(find_plan, self._title(index), self.attention, run, leaves, spec)
            except NoShardingFound as refused:
                if not refused.may_partition:
                    raise
                intercept(block)
                plan = trial(find_partition, self.attention, block, run, leaves, spec)
                if plan is None:
                    raise
                if plan.share >= WORTH and (self.may_partition or self.stages is not None):
                    self._note(name, logging.WARNING, describe(plan, refused))
                else:
                    plan = only_if_small(plan, refused)
        restore(kept)
        return plan

    def _forget_kinds(self, keys: Iterable[Any]) -> None:
        for key in keys:
            self._partitioned.pop(key, None)
        self._steps.clear()

    def _note(self, name: str, level: int, text: str) -> None:
        kind = type(dict(self.blocks)[name]).__name__
        if kind not in self._noted:
            self._noted.add(kind)
            log.log(level, text)

    def _untraced(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stages is None else self.stages.cut.untraced()

    def _title(self, index: int) -> str:
        name, block = self.blocks[index]
        return f"{type(block).__name__} ({self._name}.{name})"

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    @property
    def partitioned(self) -> tuple[PartitionedBlock, ...]:
        """The kinds of blocks that run on all tokens, their operations partitioned."""
        return tuple(self._partitioned.values())

    def forget(self) -> None:
        """Forget all kinds of block calls after a change of the model: each is analysed and checked again."""
        for known in (self._plans, self._steps, self._partitioned, self._rows):
            known.clear()
        self._look()

    def _look(self) -> None:
        """Take the present blocks. Their processors are read in each call: pipelines exchange them in the middle of
        one."""
        self._fingerprints = [fingerprint(block) for _, block in self.blocks]
        parts = [map(vars, block.modules()) for _, block in self.blocks]
        self._attentions = [[own for own in of_block if PROCESSOR in own] for of_block in parts]

    def install(self) -> None:
        """Put the interceptor at the blocks, outside all others; those of other stages are on meta by now."""
        self._look()
        self._owned = [not any(p.is_meta for p in block.parameters()) for _, block in self.blocks]
        intercept_calls([block for _, block in self.blocks], self.block_call)


def automatic() -> bool:
    """Return whether a forward is running under a found plan."""
    return _flow.get() is not None
