"""Finds the operations of a block that can be partitioned over ranks, by trial.

A module is partitioned by rows if it gives the same on each rank's rows as on all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from shardit.errors import RankError
from shardit.parallel.attention.block_attention import DONE, FAILED, exchange_state
from shardit.parallel.attention.sequence_attention import Call, SequenceAttention
from shardit.parallel.compare import close, perturbed
from shardit.parallel.sequence.multiplications import Multiplications
from shardit.parallel.sequence.partitioned.modules import Arguments
from shardit.parallel.sequence.partitioned.run import (
    PartitionedBlock,
    PartitionedCall,
    Rows,
    attention_share,
    intercept_operations,
    rows_by_module,
)
from shardit.parallel.sequence.partitioned.trial import ModuleTrial

log = logging.getLogger(__name__)

LEAST = 0.01
"""Share of a block's multiplications from which on a module is worth a message."""

WORTH = 0.5
"""Share of a block's multiplications that has to be partitioned, or the block is refused, unless its list is small."""


class Observer:
    """Watches a block that runs on all tokens: tries each module on rows, the outer ones first, and counts
    multiplications. failed: modules that cannot be partitioned. several: whether modules that take several
    tensors are tried."""

    def __init__(self, block: nn.Module, size: int, failed: Collection[str] = (), several: bool = True):
        self._names = {module: name for name, module in block.named_modules()}
        self._size, self._several = size, several
        self._inside = False
        self.count, self.attention = Multiplications(), 0
        self.rows: dict[str, Rows] = {}
        self.costs: dict[str, int] = {}
        self.failed = set(failed)

    def module_call(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `modules.ModuleHandler`."""
        name, given = self._names[module], Arguments.of(args, kwargs)
        tried = name not in self.failed and bool(given.places)
        tried &= len(given.places) == 1 or (given.plain and self._several)
        if self._inside or not tried:
            if not self._inside:
                self.failed.add(name)
            return call(*args, **kwargs)
        before, attention = self.count.total, self.attention
        trial = ModuleTrial(module, call, given, self._size, lambda: self.count.total)
        self._inside = True
        try:
            out = trial.run()
            after = self.count.total
            found = trial.find()
        finally:
            self._inside = False
        if found is not None and self.rows.get(name, found[0]) == found[0]:
            self.rows[name] = found[0]
            self.costs[name] = self.costs.get(name, 0) + found[1]
            self.count.total, self.attention = after, attention  # what is inside is partitioned with it
            return out
        self.failed.add(name)
        self.count.total, self.attention = before, attention
        return call(*args, **kwargs)

    def attend(self, call: Call) -> torch.Tensor:
        """See `hook.Handler`."""
        with without_modes():  # some attention functions cannot be traced inside, and some are not known to be counted
            out = call.inner(call.q, call.k, call.v, call.mask)
        multiplications = call.multiplications(call.k.shape[1])
        self.count.total += multiplications
        self.attention += multiplications if attention_share(call, self._size) is not None else 0
        return out

    def found(self) -> PartitionedBlock:
        """Return the modules that are worth a message, and the share that is partitioned."""
        total = self.count.total
        kept = [name for name, cost in self.costs.items() if cost >= LEAST * total and name not in self.failed]
        partitioned = sum(self.costs[name] for name in kept) + self.attention
        return PartitionedBlock({name: self.rows[name] for name in kept}, partitioned / total if total else 0.0, total)


def find_partition(
    attention: SequenceAttention, block: nn.Module, call: Callable[..., Any], leaves: list[Any], spec: Any
) -> PartitionedBlock | None:
    """Find the operations of a block call with these (whole) argument leaves that are partitioned. Collective over
    "sp". `call`: see `find_plan`. Returns None if the ranks together do not give what the block does."""
    # With noise, masks that hide nothing show; without it, flags that are numbers do, such as zeros for "no picture".
    cases = [_Case(attention, block, call, given, spec) for given in (perturbed(leaves), leaves)]
    failed: frozenset[str] = frozenset()
    # At last without modules of several tensors: whole attention may keep a map of its call, of the rank's rows alone.
    for case, several in ((cases[0], True), (cases[1], True), (cases[1], False)):
        found, failed = attention.sp.group.broadcast_object(case.observed(failed, several), 0)
        if found is None:
            return None
        if all(other.same(found) for other in cases):
            return found
    return None


class _Case:
    """A call of a block, and what it gives on all tokens."""

    def __init__(
        self,
        attention: SequenceAttention,
        block: nn.Module,
        call: Callable[..., Any],
        leaves: list[Any],
        spec: Any,
    ):
        self._attention, self._block, self._call, self._leaves, self._spec = attention, block, call, leaves, spec
        self._expected = self._run(None)

    def _run(self, how: Any) -> Any:
        args, kwargs = tree_unflatten(tree_map_only(torch.Tensor, torch.clone, self._leaves), self._spec)
        with nullcontext() if how is None else intercept_operations(how):
            return self._call(*args, **kwargs)

    def observed(self, failed: frozenset[str], several: bool) -> tuple[PartitionedBlock | None, frozenset[str]]:
        """Return what can be partitioned without the modules that have failed, and those that have failed by now."""
        observer = Observer(self._block, self._attention.sp.size, failed, several)
        try:
            with observer.count:
                self._run(observer)
            return observer.found(), frozenset(observer.failed)
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # uncompiled kernels that are not called through the registry cannot be counted
            log.debug("the operations of %s cannot be counted", type(self._block).__name__, exc_info=True)
            return None, failed

    def same(self, found: PartitionedBlock) -> bool:
        """Return whether the ranks together give what the block does. Collective."""
        right, (out, left) = False, self._expected
        try:
            got, got_left = self._run(PartitionedCall(self._attention.sp, rows_by_module(self._block, found)))
            pairs = list(zip(tree_leaves(out), tree_leaves(got), strict=True))
            # What a module keeps of a call on its rows (attention maps) would be a part on each rank.
            right = all(close(a, b) for a, b in [*pairs, *zip(left, got_left, strict=True)])
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # code after a module may need what the gathered rows are not
            log.debug("%s fails when it is partitioned", type(self._block).__name__, exc_info=True)
        gathered = exchange_state(self._attention, DONE if right else FAILED)
        return all(codes[0] == DONE for codes in gathered)


def describe(partitioned: PartitionedBlock, why: Exception | None) -> str:
    """Return a note on a kind of block that is partitioned."""
    reason = str(why).partition(": set ulysses_degree")[0]
    return (
        f"{reason}. Every rank runs these blocks on all tokens and computes its share of {partitioned.share:.0%} of "
        "their multiplications: that saves time, but no memory for activations"
    )
