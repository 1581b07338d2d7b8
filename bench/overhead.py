"""What a session on one rank costs over plain diffusers, in CPU time per step."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.model import Size, fewer_tokens
from bench.ranks import Ranks


def measure(size: Size, folder: str, runs: int) -> dict[str, Any]:
    """`runs` interleaved runs of one request without guidance, in one process; the median of the pairs' ratios."""
    size = fewer_tokens(size)
    with Ranks(1) as ranks:
        ranks.call("open_plain", folder)
        ranks.call("open_session", "one rank", folder, {}, 1)
        pairs = ranks.call("interleave", "one rank", size, runs)[0]
    ratios = sorted(ours / plain for plain, ours in pairs)
    return {
        "runs": runs,
        "tokens": size.tokens,
        "plain_cpu_s_per_step": median(plain for plain, _ in pairs),
        "session_cpu_s_per_step": median(ours for _, ours in pairs),
        "extra_percent": (median(ratios) - 1) * 100,
        "quartiles_percent": [(ratios[len(ratios) * k // 4] - 1) * 100 for k in (1, 3)],
    }
