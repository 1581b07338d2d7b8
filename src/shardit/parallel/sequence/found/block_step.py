"""One kind of block call, and how ranks share it."""

from __future__ import annotations

from dataclasses import dataclass

from shardit.parallel.attention.sequence_attention import AttentionLayout
from shardit.parallel.sequence.found.search import BlockPlan
from shardit.parallel.sequence.partitioned.run import PartitionedBlock

MAX_STEPS = 1024
"""Sizes of block calls that are remembered per transformer."""


@dataclass
class BlockStep:
    """A kind of block call at given sizes. plan None: every rank runs it whole, `partitioned` by operations if it is
    given. layouts None: not learned yet, or read off the tensors of each call since they may depend on values.
    multiplications: of a call, without those of blocks that are shorter than the number of ranks."""

    plan: BlockPlan | None
    partitioned: PartitionedBlock | None = None
    totals: tuple[int, ...] = ()
    layouts: list[AttentionLayout] | None = None
    multiplications: int = 0
