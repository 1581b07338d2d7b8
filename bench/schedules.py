"""Idle share and traffic of looped schedules, from replaying what the real schedule issues; no model runs."""

from __future__ import annotations

from typing import Any

from bench.model import Size

MAX_RANKS = 8
WORKLOADS = ((1, 1), (1, 2), (2, 2), (4, 1))
"""(requests in flight, branches of a step): one without and with guidance, two with, four without."""


def measure(size: Size) -> list[dict[str, Any]]:
    """For P 1..8, contiguous and automatic: speedup and idle share of the replay next to the formula, and bytes.

    Every chunk takes the same time and messages none. A hop carries the hidden states, a result the noise.
    """
    from shardit.core.placement.partition import automatic_chunks, bound
    from shardit.core.simulate.replay import Workload, timeline

    hop_bytes = 4 * size.tokens * size.heads * size.head_dim
    result_bytes = 4 * size.tokens * 2 * 2 * 16
    rows = []
    for requests, branches in WORKLOADS:
        for ranks in range(1, MAX_RANKS + 1):
            automatic = automatic_chunks(max(size.blocks, ranks), ranks, requests * branches)
            for chunks in sorted({1, automatic}):
                load = Workload(ranks, chunks, branches, requests, size.steps, max_in_flight=requests)
                line = timeline(load, hop_bytes=hop_bytes, result_bytes=result_bytes)
                chain = chunks if requests == 1 else chunks * size.steps
                formula = bound(requests * branches, ranks, chain)
                rows.append(
                    {
                        "requests": requests,
                        "branches": branches,
                        "ranks": ranks,
                        "chunks": chunks,
                        "speedup": line.speedup,
                        "formula": formula,
                        "idle": sum(line.idle) / ranks,
                        "formula_idle": 1 - formula / ranks,
                        "hops_per_step": line.hops_per_step,
                        "bytes_per_step": line.bytes_per_step,
                    }
                )
    return rows
