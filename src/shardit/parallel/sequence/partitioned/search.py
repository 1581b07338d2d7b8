"""Finds the operations of a block that can be partitioned over ranks, by trial.

A module is partitioned by rows if it gives the same on each rank's rows as on all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry

from shardit.errors import RankError
from shardit.parallel.attention.block_attention import DONE, FAILED, exchange_state
from shardit.parallel.attention.sequence_attention import Call, SequenceAttention
from shardit.parallel.compare import close, disturbed
from shardit.parallel.sequence.partitioned.modules import Arguments
from shardit.parallel.sequence.partitioned.run import (
    PartitionedBlock,
    PartitionedCall,
    Rows,
    attention_share,
    multiplications,
    operations_go_to,
    rows_by_module,
)
from shardit.parallel.sequence.partitioned.trial import ModuleTrial

log = logging.getLogger(__name__)

LEAST = 0.01
"""Share of a block's multiplications from which on a module is worth a message."""

WORTH = 0.5
"""Share of a block's multiplications that has to be partitioned, or the block is refused, unless its list is small."""

SMALL = 0.05
"""Share of the parameters of all blocks up to which a list of blocks is small."""


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_higher_order_operators = True
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out) // 2
        return out


class Observer:
    """Watches a block that runs on all tokens: tries each module on rows, the outer ones first, and counts
    multiplications."""

    def __init__(self, block: nn.Module, size: int):
        self._names = {module: name for name, module in block.named_modules()}
        self._size = size
        self._inside = False
        self.count, self.attention = Multiplications(), 0
        self.rows: dict[str, Rows] = {}
        self.costs: dict[str, int] = {}
        self._failed: set[str] = set()

    def module_call(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `modules.ModuleHandler`."""
        name, given = self._names[module], Arguments.of(args, kwargs)
        tried = bool(given.places) and (len(given.places) == 1 or given.plain)
        if self._inside or not tried:
            if not self._inside:
                self._failed.add(name)
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
        if found is not None and name not in self._failed and self.rows.get(name, found[0]) == found[0]:
            self.rows[name] = found[0]
            self.costs[name] = self.costs.get(name, 0) + found[1]
            self.count.total, self.attention = after, attention  # what is inside is partitioned with it
            return out
        self._failed.add(name)
        self.count.total, self.attention = before, attention
        return call(*args, **kwargs)

    def attend(self, call: Call) -> torch.Tensor:
        """See `hook.Handler`."""
        with without_modes():  # some attention functions cannot be traced inside, and some are not known to be counted
            out = call.inner(call.q, call.k, call.v, call.mask)
        self.count.total += multiplications(call)
        self.attention += multiplications(call) if attention_share(call, self._size) is not None else 0
        return out

    def found(self) -> PartitionedBlock:
        """Return the modules that are worth a message, and the share that is partitioned."""
        total = self.count.total
        kept = [name for name, cost in self.costs.items() if cost >= LEAST * total and name not in self._failed]
        partitioned = sum(self.costs[name] for name in kept) + self.attention
        return PartitionedBlock({name: self.rows[name] for name in kept}, partitioned / total if total else 0.0)


def find_partition(
    attention: SequenceAttention, block: nn.Module, call: Callable[..., Any], leaves: list[Any], spec: Any
) -> PartitionedBlock | None:
    """Find the operations of a block call with these (whole) argument leaves that are partitioned. Collective over
    "sp". `call`: see `find_plan`. Returns None if the ranks together do not give what the block does."""
    leaves, sp = disturbed(leaves), attention.sp

    def run(how: Any) -> Any:
        given = tree_map_only(torch.Tensor, torch.clone, leaves)
        args, kwargs = tree_unflatten(given, spec)
        with operations_go_to(how):
            return call(*args, **kwargs)

    args, kwargs = tree_unflatten(tree_map_only(torch.Tensor, torch.clone, leaves), spec)
    out, left = call(*args, **kwargs)
    observer, right, found = Observer(block, sp.size), False, None
    try:
        with observer.count:
            run(observer)
        found = observer.found()
    except (RankError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # uncompiled kernels that are not called through the registry cannot be counted
        log.debug("the operations of %s cannot be counted", type(block).__name__, exc_info=True)
    found = sp.group.broadcast_object(found, 0)
    if found is None:
        return None
    try:
        got, got_left = run(PartitionedCall(sp, rows_by_module(block, found)))
        pairs = list(zip(tree_leaves(out), tree_leaves(got), strict=True))
        # What a module keeps of a call on its rows (attention maps) would be a part on each rank.
        right = all(close(a, b) for a, b in [*pairs, *zip(left, got_left, strict=True)])
    except (RankError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # code after a module may need what the gathered rows are not
        log.debug("%s fails when it is partitioned", type(block).__name__, exc_info=True)
    gathered = exchange_state(attention, DONE if right else FAILED)
    return found if all(codes[0] == DONE for codes in gathered) else None


def share_of_list(name: str, blocks: Sequence[tuple[str, nn.Module]]) -> float:
    """Return the share of the parameters of all blocks that the list of one block has."""
    home = name.rpartition(".")[0]
    counts = [(other.rpartition(".")[0], sum(p.numel() for p in block.parameters())) for other, block in blocks]
    return sum(n for of, n in counts if of == home) / max(1, sum(n for _, n in counts))


def describe(partitioned: PartitionedBlock, why: Exception) -> str:
    """Return a note on a kind of block that is partitioned."""
    reason = str(why).partition(": set ulysses_degree")[0]
    return (
        f"{reason}. Every rank runs these blocks on all tokens and computes its share of {partitioned.share:.0%} of "
        "their multiplications: that saves time, but no memory for activations"
    )
