"""Finds the sharding of a kind of block call: candidates are tried against the whole block, on all ranks at once.

A candidate passes if it computes the same as the whole block, twice: from arguments with noise, so that none passes by
chance (masks that hide nothing, text that is all padding), and from the arguments as they are, because noise also sets
flags that are numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.plans.trace import HostReads
from shardit.errors import RankError, UnsupportedError
from shardit.parallel.attention.block_attention import DONE, FAILED, BlockAttention, OutOfStep, agree, exchange_state
from shardit.parallel.attention.hook import intercept_attention
from shardit.parallel.attention.sequence_attention import NotInRing, SequenceAttention
from shardit.parallel.compare import close, perturbed, same, same_left
from shardit.parallel.dataflow import Dataflow
from shardit.parallel.sequence.multiplications import Multiplications
from shardit.parallel.sequence.shards.lazy import gather
from shardit.parallel.sequence.shards.token_dims import (
    Candidate,
    Shape,
    Split,
    candidates,
    cut,
    local_shape,
    out_options,
)

REMEDY = (
    "set ulysses_degree=1 and ring_degree=1, or say in the model's _sp_plan where its tensors are split "
    "(docs/sequence-plans.md)"
)
"""The remedy for a model whose tokens cannot be sharded by a found plan."""


class NoShardingFound(UnsupportedError):
    """No way was found to shard a model. may_partition: whether operations of its block may be partitioned over the
    ranks instead."""

    may_partition = False


@dataclass(frozen=True)
class BlockPlan:
    """The sharding of a kind of block call. outs: split of each output leaf. sharded: see `BlockAttention`. by_values:
    the lengths of its attention may depend on values. multiplications: of all ranks in the call in which it was found,
    with that number of `tokens`."""

    candidate: Candidate
    outs: tuple[Split | None, ...]
    sharded: tuple[tuple[bool, bool], ...]
    by_values: bool = False
    multiplications: int = 0
    tokens: int = 1


def find_plan(
    name: str, attention: SequenceAttention, call: Callable[..., Any], leaves: list[Any], spec: Any
) -> BlockPlan | None:
    """Try the candidates for a block call with these (whole) argument leaves. Collective over "sp". `call` returns what
    the block does, and the values that it leaves on its modules.

    Returns None if the streams are shorter than the number of ranks, so that every rank runs the block whole. Raises
    UnsupportedError if no candidate gives the result of the whole block, or the block writes to its arguments.
    """
    cases = [_WholeCall.of(name, call, *given, spec) for given in ((perturbed(leaves), True), (leaves, False))]
    shapes = shapes_of(leaves)
    found = candidates(shapes, shapes_of(cases[0].expected))
    if found and max(found[0].totals(shapes)) < attention.sp.size:
        return None
    failures: list[Exception] = []
    for candidate in found:
        attempts = [_Attempt(attention, candidate, candidate.totals(shapes), case, failures) for case in cases]
        plan = _plan_of_all(attempts, call, spec)
        if plan is not None:
            return plan
    why = f"; {failures[0]}" if failures and isinstance(failures[0], UnsupportedError) else ""
    sizes = ", ".join(str(list(shape)) for shape in shapes if shape is not None)
    refused = NoShardingFound(
        f"no way was found to shard the tokens of {name} over {attention.sp.size} ranks (its arguments have the "
        f"shapes {sizes}; {len(found)} ways were tried{why}): {REMEDY}"
    )
    refused.may_partition = not any(isinstance(failure, NotInRing) for failure in failures[:1])
    raise refused


def _plan_of_all(attempts: Sequence[_Attempt], call: Callable[..., Any], spec: Any) -> BlockPlan | None:
    """Return the plan that passes all attempts, for the arguments of the last one; None if one of them fails."""
    plans: list[BlockPlan] = []
    for attempt in attempts:
        plan = attempt.run(call, spec)
        if plan is None:
            return None
        plans.append(plan)
    return replace(plans[-1], by_values=any(plan.by_values for plan in plans))


@dataclass
class _WholeCall:
    """What the whole block makes of some argument leaves. left: on its modules. noisy: whether they have noise."""

    leaves: list[Any]
    noisy: bool
    expected: list[Any]
    out_spec: Any
    left: list[torch.Tensor]

    @classmethod
    def of(cls, name: str, call: Callable[..., Any], leaves: list[Any], noisy: bool, spec: Any) -> _WholeCall:
        """Run the block. Raises NoShardingFound if it writes to its arguments."""
        kept = [leaf.clone() if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        out, left = _call(call, leaves, spec)
        if any(k is not None and not same(k, leaf) for k, leaf in zip(kept, leaves, strict=True)):
            raise NoShardingFound(f"{name} writes to its arguments: {REMEDY}")
        return cls(leaves, noisy, *tree_flatten(out), left)


@dataclass
class _Attempt:
    attention: SequenceAttention
    candidate: Candidate
    totals: tuple[int, ...]
    case: _WholeCall
    failures: list[Exception]

    def run(self, call: Callable[..., Any], spec: Any) -> BlockPlan | None:
        """Return the plan, if this candidate is right on every rank."""
        sp = self.attention.sp
        shards = [
            leaf if split is None else cut(leaf, split, self.totals, sp.index, sp.size).clone()
            for leaf, split in zip(self.case.leaves, self.candidate.splits, strict=True)
        ]
        dataflow = Dataflow(s for s, split in zip(shards, self.candidate.splits, strict=True) if split is not None)
        block = BlockAttention(self.attention, [], dataflow=dataflow, noisy=self.case.noisy)
        count = Multiplications()
        outs = self._outputs(block, count, call, shards, spec)
        splits = None if outs is None else self._out_splits(outs)
        if outs is None or splits is None:
            return None
        wholes = [self._whole(out, split) for out, split in zip(outs, splits, strict=True)]
        right = all(close(x, y) for x, y in zip(self.case.expected, wholes, strict=True))
        counted = count.total + block.multiplications
        gathered = agree(self.attention, [int(right), int(block.by_values), counted])
        if not all(codes[0] for codes in gathered):
            return None
        by_values, counted = any(codes[1] for codes in gathered), sum(codes[2] for codes in gathered)
        return BlockPlan(
            self.candidate, tuple(splits), tuple(block.sharded), by_values, counted, max(1, sum(self.totals))
        )

    def _outputs(
        self, block: BlockAttention, count: Multiplications, call: Callable[..., Any], shards: list[Any], spec: Any
    ) -> list[Any] | None:
        """Return the output leaves; None if it failed on any rank. No rank waits for one that has failed."""
        outs: list[Any] = []
        code = FAILED
        assert block.dataflow is not None
        try:
            with intercept_attention(block), HostReads(block.dataflow.decides), block.dataflow, count:
                out, left = _call(call, shards, spec)
            outs, out_spec = tree_flatten(out)
            if not same_left(self.case.left, left):
                raise UnsupportedError("what it leaves on its modules is another thing on shards")
            code = DONE if out_spec == self.case.out_spec and len(outs) == len(self.case.expected) else FAILED
        except OutOfStep:
            return None
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a block that cannot take such shards may raise any exception
            self.failures.append(error)
        gathered = exchange_state(self.attention, code)
        return outs if all(codes[0] == DONE for codes in gathered) else None

    def _out_splits(self, outs: list[Any]) -> list[Split | None] | None:
        """Return for each output leaf the first split of its shape that is right on every rank."""
        sp = self.attention.sp
        chosen: list[Split | None] = []
        for full, shard in zip(shapes_of(self.case.expected), shapes_of(outs), strict=True):
            options = [None] if full is None else out_options(full, self.totals)
            fits = [shard == (full and local_shape(full, o, self.totals, sp.index, sp.size)) for o in options]
            gathered = agree(self.attention, [int(fit) for fit in fits])
            good = [o for o, codes in zip(options, zip(*gathered, strict=True), strict=True) if all(codes)]
            if not good:
                return None
            chosen.append(good[0])
        return chosen

    def _whole(self, out: Any, split: Split | None) -> Any:
        if split is None:
            return out
        return gather(out, split.dim, [self.totals[p] for p in split.parts], self.attention.sp)


def _call(call: Callable[..., Any], leaves: list[Any], spec: Any) -> Any:
    args, kwargs = tree_unflatten(leaves, spec)
    return call(*args, **kwargs)


def shapes_of(leaves: Sequence[Any]) -> list[Shape | None]:
    """Return the shapes of tensors, None for leaves that are not tensors."""
    return [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
