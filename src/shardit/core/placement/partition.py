"""Places blocks on ranks: costs, balanced cuts, number of looped chunks. Pure functions over numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch

from shardit.config import check_stages
from shardit.errors import UnsupportedError

MAX_CHUNKS = 8
"""Limit of looped chunks per rank in the automatic choice: a hop per chunk has to stay small next to it."""

# Parameters for one vector per sample, or for the few text tokens of a two-stream block, cost next to no time.
_CHEAP = re.compile(r"(^|[._])(add|context|txt|text|encoder|mod|modulation|adaln|adaLN_modulation|bias)([._]|$)|norm")


def block_cost(block: torch.nn.Module) -> float:
    """Return the estimated time of one block call, in arbitrary units: its matrix parameters, weighted by their number
    of tokens.

    A two-stream block (Flux double, SD3) has twice the parameters of a one-stream block but not twice the work, since
    each token is processed by only one of the two sets; modulation processes a single vector.
    """
    cost = 0.0
    for name, parameter in block.named_parameters():
        if parameter.ndim >= 2:
            cost += parameter.numel() * (0.1 if _CHEAP.search(name) else 1.0)
    return cost or 1.0


def balanced_cuts(costs: Sequence[float], parts: int) -> list[int]:
    """Return sizes of `parts` contiguous non-empty runs of `costs` that minimise the largest sum, and then the sum of
    squares: if one large block decides the largest sum, the others are still even.

    Linear partition by dynamic programming; among equals the later runs are the lighter ones, since the last stage also
    runs the epilogue. Raises UnsupportedError if there are fewer blocks than parts.
    """
    n = len(costs)
    if n < parts:
        raise UnsupportedError(f"cannot cut {n} blocks into {parts} parts; lower the pipeline size to at most {n}")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    largest, _ = _best_runs(prefix, parts, lambda before, run: max(before, run))
    bound = largest * (1 + 1e-12)
    _, sizes = _best_runs(prefix, parts, lambda before, run: before + run * run if run <= bound else inf)
    return sizes


def _best_runs(prefix: Sequence[float], parts: int, worth: Callable[[float, float], float]) -> tuple[float, list[int]]:
    """Return the least worth of runs, and their sizes. prefix: sums from the beginning. worth: given that of the runs
    before, and the sum of one more."""
    n = len(prefix) - 1
    best = [[inf] * (n + 1) for _ in range(parts + 1)]
    cut = [[0] * (n + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for k in range(1, parts + 1):
        for end in range(k, n + 1):
            # Ties go to the longest prefix, that is to the lightest last run.
            for start in range(end - 1, k - 2, -1):
                found = worth(best[k - 1][start], prefix[end] - prefix[start])
                if found < best[k][end] * (1 - 1e-12):
                    best[k][end], cut[k][end] = found, start
    sizes, end = [], n
    for k in range(parts, 0, -1):
        sizes.append(end - cut[k][end])
        end = cut[k][end]
    return best[parts][n], sizes[::-1]


def automatic_chunks(num_blocks: int, pp_size: int, in_flight: int) -> int:
    """Return the looped chunks per rank for `in_flight` micro-batches in flight at once (branches x max_in_flight).

    With one micro-batch there is nothing to overlap: contiguous (1). Otherwise as many as the blocks allow, at most
    MAX_CHUNKS: M micro-batches on P ranks take P*v + M - 1 chunk times (M <= P) or M*v + P - 1 of M*P*v, so each
    further chunk shrinks the fill.
    """
    if in_flight <= 1 or pp_size == 1:
        return 1
    return max(1, min(MAX_CHUNKS, num_blocks // pp_size))


def bound(micro_batches: int, pp_size: int, chunks: int) -> float:
    """Return the speedup over one rank of M equal micro-batches on P ranks with v chunks each, without communication
    cost."""
    m, p, v = micro_batches, pp_size, chunks
    return m * p * v / (p * v + m - 1) if m <= p else m * p * v / (m * v + p - 1)


@dataclass(frozen=True)
class ChunkPlacement:
    """Sizes of the chunks in execution order; chunk c belongs to stage c % pp_size."""

    sizes: tuple[int, ...]
    pp_size: int

    @property
    def chunks(self) -> int:
        """Chunks per rank."""
        return len(self.sizes) // self.pp_size

    def owners(self) -> list[int]:
        """Return the stage of each block, in execution order."""
        return [chunk % self.pp_size for chunk, size in enumerate(self.sizes) for _ in range(size)]


def place_blocks(
    costs: Sequence[float], pp_size: int, chunks: int, partition: Sequence[int] | None = None
) -> ChunkPlacement:
    """Place the blocks of one transformer.

    `partition` (already checked) gives the sizes of all chunks; otherwise cost is balanced over `chunks` x `pp_size`
    runs, with fewer chunks if there are too few blocks. Raises UnsupportedError with fewer blocks than stages.
    """
    if partition is not None:
        return ChunkPlacement(tuple(partition), pp_size)
    check_stages(pp_size, len(costs))
    chunks = max(1, min(chunks, len(costs) // pp_size))
    return ChunkPlacement(tuple(balanced_cuts(costs, chunks * pp_size)), pp_size)
