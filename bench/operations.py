"""Where the time of an axis goes: seconds of a rank by kind of operation, under torch's profiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median
from typing import Any

from bench.model import Size
from bench.ranks import Ranks
from bench.speed import RANKS, SEEDS

KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "copies": ("copy_", "cat", "fill_", "zero_", "constant_pad_nd"),
}
"""Kinds of operations of aten by name; all others that compute are "elementwise" (norms, gates, sums, activations)."""

AXES = ("ulysses_degree", "ring_degree", "tensor_parallel_size")


def measure(size: Size, folder: str, rounds: int) -> dict[str, Any]:
    """Medians of interleaved runs of one request without guidance: plain diffusers alone, two copies at once, each axis
    inside blocks. Seconds of the first rank: `wall`, in operations by kind, in `python` (CPU time of the main thread
    outside of operations), in other threads (gloo's), and `waiting`, the rest."""
    found: dict[str, list[dict[str, float]]] = {}
    with Ranks(RANKS) as ranks, Ranks(RANKS) as copies:
        copies.call("open_plain", folder)
        for axis in AXES:
            ranks.call("open_sharded", axis, folder, {axis: RANKS})
            ranks.call("run_peer", axis, size, SEEDS[:1], False)
        copies.call("run_plain", size, SEEDS[:1], False)
        for seed in (SEEDS * rounds)[:rounds]:
            for name, call in _calls(ranks, copies, size, seed):
                found.setdefault(name, []).append(call()[0])
    return {name: {kind: median(run[kind] for run in runs) for kind in runs[0]} for name, runs in found.items()}


def _calls(ranks: Ranks, copies: Ranks, size: Size, seed: int) -> list[tuple[str, Callable[[], list[Any]]]]:
    plain = ("operations", None, size, (seed,))
    of_axes = [(axis, functools.partial(ranks.call, "operations", axis, size, (seed,))) for axis in AXES]
    return [("plain", lambda: copies.call(*plain, on=(0,))), ("two copies", lambda: copies.call(*plain)), *of_axes]


def seconds_by_kind(profile: Any, wall_s: float, main_s: float, cpu_s: float) -> dict[str, float]:
    """Sum the own time of the operations that a profiler has seen, in seconds, by kind."""
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    seconds = dict.fromkeys((*KINDS, "elementwise"), 0.0)
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            seconds[kind_of.get(event.key, "elementwise")] += event.self_cpu_time_total / 1e6
    computing = sum(seconds.values())
    return {
        "wall": wall_s,
        **seconds,
        "python": main_s - computing,
        "other threads": cpu_s - main_s,
        "waiting": wall_s - main_s,
    }
