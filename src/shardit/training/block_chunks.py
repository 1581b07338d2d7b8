"""Which chunk of the pipeline each block of a trained model is in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from shardit.config import DiffusionParallelConfig, fitting_partition
from shardit.core.placement.partition import block_cost, place_blocks
from shardit.core.training.schedules import CHUNKED
from shardit.errors import InputError, UnsupportedError

_OF_TRAINED = 4
"""Times the bytes of a weight that training holds for it: the weight, its gradient and two averages of AdamW."""


@dataclass(frozen=True)
class Placing:
    """Places blocks on the chunks of all stages. costs: of each block. note: for the user, where a schedule gets fewer
    chunks than it asks for."""

    costs: list[float]
    stages: int
    chunks: int
    partition: tuple[int, ...] | None = None
    note: str | None = None

    def __call__(self, order: Sequence[int]) -> list[int]:
        """Return the chunk of each block. order: the numbers of the blocks as they run."""
        if self.stages == 1:
            return [0] * len(self.costs)
        costs = [self.costs[number] for number in order]
        sizes = place_blocks(costs, self.stages, self.chunks, self.partition).sizes
        in_order = (chunk for chunk, size in enumerate(sizes) for _ in range(size))
        chunk_of = dict(zip(order, in_order, strict=True))
        return [chunk_of[number] for number in range(len(self.costs))]


def placing(model: nn.Module, blocks: list[nn.Module], config: DiffusionParallelConfig, schedule: str) -> Placing:
    """Return how the blocks of a model are placed. Raises InputError for a layer partition that does not fit, and
    UnsupportedError where there are too few blocks."""
    stages = config.pipeline_parallel_size
    if stages == 1:
        return Placing([1.0] * len(blocks), 1, 1)
    wanted = (config.pipeline_chunks or 2) if schedule in CHUNKED else 1
    partition = fitting_partition(config, os.environ, len(blocks))
    if partition is not None and len(partition) != stages * wanted:
        raise InputError(
            f"layer_partition has {len(partition)} entries: schedule={schedule!r} over {stages} stages needs "
            f"{stages * wanted}"
        )
    chunks, note = min(wanted, len(blocks) // stages), None
    if chunks < wanted:
        few = (
            f"schedule={schedule!r} has {wanted} chunks on each of {stages} stages, so it needs {wanted * stages} "
            f"blocks, and {type(model).__name__} has {len(blocks)}"
        )
        if schedule == "zbv":
            raise UnsupportedError(f"{few}: use schedule='1f1b', or pipeline_parallel_size={len(blocks) // 2}")
        note = f"{few}: it runs as 1f1b" if chunks == 1 else f"{few}: it runs with {chunks} chunks"
    cost = _held if _mostly_frozen(blocks) else block_cost
    return Placing([cost(block) for block in blocks], stages, chunks, partition, note)


def _mostly_frozen(blocks: list[nn.Module]) -> bool:
    """Return whether most weights are frozen, as with a LoRA."""
    every = [parameter for block in blocks for parameter in block.parameters()]
    return sum(one.numel() for one in every if one.requires_grad) * 2 < sum(one.numel() for one in every)


def _held(block: nn.Module) -> float:
    """Return the bytes that training holds for the weights of a block."""
    return float(sum(one.nbytes * (_OF_TRAINED if one.requires_grad else 1) for one in block.parameters()))
