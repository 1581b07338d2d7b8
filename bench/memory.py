"""Peak memory of each rank, and the bytes of weights that it read, next to those that it owns."""

from __future__ import annotations

from typing import Any

from bench.model import Size
from bench.ranks import Ranks

RANKS = 2


def measure(size: Size, folder: str) -> dict[str, Any]:
    """Fresh processes that load the model and run one request with guidance."""
    with Ranks(1) as ranks:
        idle = ranks.call("memory")[0]["now"]
        ranks.call("reset_peak")
        ranks.call("open_plain", folder)
        ranks.call("run_plain", size, (1,), True)
        plain = ranks.call("memory")[0]["peak"]
    with Ranks(RANKS) as ranks:
        owned = ranks.call("owned_bytes", folder, on=(0,))[0]
        ranks.call("reset_peak")
        opened = ranks.call("open_session", "two ranks", folder, {"pipeline_parallel_size": 2}, 1)
        ranks.call("run_session", "two ranks", size, (1,), True)
        peaks = [memory["peak"] for memory in ranks.call("memory")]
    return {
        "idle_process_bytes": idle,
        "plain_peak_bytes": plain,
        "ranks": [
            {
                "rank": rank,
                "peak_bytes": peaks[rank],
                "owned_bytes": owned[rank],
                "read_bytes": opened[rank]["bytes_read"],
                "read_over_owned": opened[rank]["bytes_read"] / owned[rank],
            }
            for rank in range(RANKS)
        ],
    }
