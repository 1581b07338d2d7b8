"""The table that people read."""

from __future__ import annotations

import statistics
from typing import Any

MIB = 2**20


def table(document: dict[str, Any]) -> str:
    """Everything that was measured, as text."""
    parts = {
        "speed": _speed,
        "axes": _speed,
        "operations": _operations,
        "overhead": _overhead,
        "host": _host,
        "memory": _memory,
        "startup": _startup,
        "numerics": _numerics,
        "schedules": _schedules,
        "training": _training,
        "serve": _serve,
        "serve-texts": _serve_texts,
    }
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [f"{machine['cpu']}, {machine['cores']} cores; {versions}; commit {machine['commit']}; {machine['date']}"]
    for name, render in parts.items():
        if name in document:
            lines += ["", *render(document[name])]
    if not machine["quiet"]:
        lines += ["", "The machine was not quiet: others computed meanwhile. Do not cite these numbers."]
    return "\n".join(lines)


def _speed(found: dict[str, Any]) -> list[str]:
    size = found["size"]
    lines = [
        f"Speed: {found['ranks']} ranks x 1 thread against plain diffusers on 1 x 1, medians of {found['rounds']}.",
        f"WanPipeline, {size['blocks']} blocks of width {size['heads'] * size['head_dim']}, {size['tokens']} tokens, "
        f"{size['steps']} steps. Two copies without communication (ceiling): {found['ceiling']:.3f}x",
        _row("requests", "chunks", "plain s", "2 ranks s", "speedup", "bound", "share", "equal"),
    ]
    lines += [
        _row(
            case["name"],
            case["chunks"],
            f"{case['plain_seconds']:.2f}",
            f"{case['seconds']:.2f}",
            f"{case['speedup']:.3f}x",
            f"{case['bound']:.3f}x",
            f"{case['share']:.3f}",
            "bitwise" if case["bitwise_equal"] else f"{case['error']:.1e}",
        )
        for case in found["cases"]
    ]
    return [*lines, *(f"  {name}: {why}" for name, why in found.get("skipped", {}).items())]


def _row(name: Any, *cells: Any) -> str:
    return f"  {name!s:<34}" + "".join(f"{cell!s:>11}" for cell in cells)


def _operations(found: dict[str, dict[str, float]]) -> list[str]:
    lines = ["Seconds of one rank by kind of operation, under torch's profiler:", _row("", *found["plain"])]
    return lines + [_row(name, *(f"{s:.2f}" for s in seconds.values())) for name, seconds in found.items()]


def _overhead(found: dict[str, Any]) -> list[str]:
    low, high = found["quartiles_percent"]
    return [
        f"One rank against plain diffusers, CPU time per step ({found['tokens']} tokens, {found['runs']} pairs): "
        f"{found['extra_percent']:+.2f} % (quartiles {low:+.2f} to {high:+.2f} %)"
    ]


HOST = {
    "own_block_us": ("one's own block call, beyond plain", 15),
    "placeholder_us": ("placeholder", 5),
    "hop_us": ("hop without the wire", 120),
    "message_us": ("  of it torch and gloo: send, receive, waits", None),
    "turn_us": ("turn of a request", None),
    "exchange_us": ("attention exchange, beyond plain", None),
    "sum_us": ("sum over tensor ranks, beyond plain", None),
    "forward_2x8_us": ("forward of 40 blocks, 2 stages x 8 chunks, beyond plain", 1500),
}
"""Steps by key, with the goal in microseconds."""


def _host(found: dict[str, Any]) -> list[str]:
    lines = [f"Host time in us; plain PyTorch takes {found['plain_block_us']:.1f} for a block", _row("", "us", "goal")]
    return lines + [_row(name, f"{found[key]:.1f}", goal or "") for key, (name, goal) in HOST.items()]


def _memory(found: dict[str, Any]) -> list[str]:
    lines = [
        f"Memory: an idle process with its imports {found['idle_process_bytes'] / MIB:.0f} MiB, "
        f"plain diffusers at its peak {found['plain_peak_bytes'] / MIB:.0f} MiB",
        _row("", "peak MiB", "owned MiB", "read MiB", "read/owned"),
    ]
    for rank in found["ranks"]:
        sizes = [f"{rank[key] / MIB:.1f}" for key in ("peak_bytes", "owned_bytes", "read_bytes")]
        lines.append(_row(f"rank {rank['rank']}", *sizes, f"{rank['read_over_owned']:.4f}"))
    return lines


def _startup(found: dict[str, Any]) -> list[str]:
    return [
        f"Start-up, medians of {found['runs']}: Omni on two ranks ready after {found['omni_s']:.1f} s, imports of "
        f"torch and diffusers in two processes at once {found['imports_s']:.1f} s: {found['beyond_imports_s']:+.1f} s"
    ]


def _numerics(found: dict[str, dict[str, float]]) -> list[str]:
    lines = ["Relative L2 distance of one forward from float64:", _row("", *found["float32"])]
    lines += [_row(dtype, *(f"{error:.2e}" for error in of_way.values())) for dtype, of_way in found.items()]
    return lines


def _schedules(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Replayed schedules (every chunk takes the same time, messages none):",
        _row("requests x branches", "ranks", "chunks", "speedup", "formula", "idle", "formula", "MiB/step"),
    ]
    lines += [
        _row(
            f"{row['requests']} x {row['branches']}",
            row["ranks"],
            row["chunks"],
            f"{row['speedup']:.3f}x",
            f"{row['formula']:.3f}x",
            f"{row['idle']:.1%}",
            f"{row['formula_idle']:.1%}",
            f"{row['bytes_per_step'] / MIB:.2f}",
        )
        for row in found
    ]
    return lines


def _serve(found: dict[str, Any]) -> list[str]:
    rows = (
        ("throughput, share of the offline engine", f"{found['throughput_share']:.3f}", ">= 0.95"),
        ("the same over all turns, quiet or not", f"{found['throughput_share_of_all_turns']:.3f}", ""),
        ("share of one that writes its files, too", f"{found['throughput_share_with_files']:.3f}", ""),
        ("request beyond compute and encoding, ms", f"{found['overhead_ms']:.1f}", "<= 20"),
        ("cancel to freed slot, steps", f"{found['cancel_steps']:g}", "<= 1"),
        ("cancel to the next job's first step, ms", f"{found['cancel_ms']:.0f}", ""),
        ("killed rank to /ready beyond start-up, s", f"{found['restart_beyond_start_s']:.2f}", "<= 3"),
        ("start to /ready, s", f"{found['start_s']:.2f}", ""),
        ("start of the API process to /health, s", f"{found['api_up_s']:.2f}", "< 1"),
        ("the command to /health, s", f"{found['health_s']:.2f}", ""),
        ("API process, MiB", f"{found['api_rss_mib']:.0f}", "< 150"),
        ("/health while ranks compute, p95 ms", f"{found['health_p95_ms']:.1f}", "<= 20"),
        ("ranks' time while HTTP is flooded, share", f"{found['flooded_share']:.2f}", ""),
    )
    return [
        f"Server: {found['clients']} clients, tiny video model on {found['in_flight']} stages, {found['requests']} "
        f"requests, medians; throughput in the quieter half of {found['turns']} turns of {found['requests_per_turn']} "
        "requests.",
        f"  {'':<44}{'measured':>11}{'wanted':>11}",
        *(f"  {name:<44}{value:>11}{wanted:>11}" for name, value, wanted in rows),
    ]


def _training(found: dict[str, Any]) -> list[str]:
    lines = [
        "Training: forward and backward of all micro-batches; medians. MiB of each rank are above those of no model."
    ]
    for task, one in found.items():
        lines += [
            f"{task}, {one['micro_batches']} micro-batches; two copies at once (ceiling): {one['ceiling']:.3f}x",
            _row("", "s", "speedup", "bound", "share", "MiB", "loss"),
        ]
        for case in one["cases"]:
            cells = [f"{case[name]:.3f}" if name in case else "" for name in ("speedup", "bound", "share")]
            peaks = "+".join(f"{peak / MIB:.0f}" for peak in case.get("peak_bytes", []) if peak)
            seconds, loss = statistics.median(case["seconds"]), case["loss"]
            lines.append(_row(case["name"], f"{seconds:.2f}", *cells, peaks, "" if loss is None else f"{loss:.6f}"))
    return lines


def _serve_texts(found: dict[str, Any]) -> list[str]:
    lines = [
        f"Texts: {found['model']} on two stages, prompts of {found['prompt']} and texts of {found['text']} tokens, "
        f"medians of {found['rounds']} turns. Tokens/s; shares of LLM.generate with as many at a time (wanted: 0.9)",
        _row("clients", "streamed", "share", "whole", "share", "generate", "one rank", "requests/s"),
    ]
    for one in found["clients"]:
        rate, share = one["tokens_per_s"], one["share_of_generate"]
        cells = [f"{rate['streamed']:.1f}", f"{share['streamed']:.2f}", f"{rate['whole']:.1f}", f"{share['whole']:.2f}"]
        cells += [f"{rate['generate']:.1f}", f"{rate['one_rank']:.1f}", f"{one['requests_per_s']:.2f}"]
        lines.append(_row(one["clients"], *cells))
    lines.append(_row("ms, 50th 95th 99th percentile", "first token", "", "", "token", "", "", "request", "", ""))
    for one in found["clients"]:
        times = [
            one[name][part] for name in ("first_token_s", "token_s", "request_s") for part in ("p50", "p95", "p99")
        ]
        lines.append(_row(one["clients"], *(f"{1000 * value:.1f}" for value in times)))
    lines.append("A long prompt beside eight texts, ms")
    lines.append(_row("", "step", "longest", "longer by", "first chunk", "last chunk", "first token"))
    for name, row in found["long_prompt"].items():
        order = ("usual_step_s", "longest_step_s", "lengthened_by_s", "chunk_alone_s", "last_chunk_s", "first_token_s")
        lines.append(_row(name, *(f"{1000 * row[each]:.1f}" if each in row else "" for each in order)))
    return lines
