"""`python -m bench`: a table, and as the last line one JSON document, also written to `bench/results/`.

Names for --only: speed, axes, operations, overhead, host, memory, startup, numerics, schedules, training, serve,
serve-texts. With --quick everything is small and nothing is waited for: it shows that the bench works, not how fast
anything is, and writes no result file unless --output names one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import (
    host,
    machine,
    memory,
    model,
    numerics,
    operations,
    overhead,
    report,
    schedules,
    serve,
    serve_texts,
    speed,
    startup,
    training,
)

NAMES = (
    "speed",
    "axes",
    "operations",
    "overhead",
    "host",
    "memory",
    "startup",
    "numerics",
    "schedules",
    "training",
    "serve",
    "serve-texts",
)
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    """Run what the options ask for."""
    options = _parser().parse_args(arguments)
    # Ranks inherit these. One thread each, nothing from the network.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and files are cleaned up
    document: dict[str, Any] = {"machine": machine.describe(arguments), "quick": options.quick}
    with tempfile.TemporaryDirectory(prefix="shardit-bench-") as folder:
        for name in options.only or NAMES:
            print(f"{name} ...", file=sys.stderr, flush=True)
            if (
                not options.quick
                and name not in ("schedules", "numerics")
                and not machine.wait_until_quiet(options.timeout)
            ):
                print("others use this machine", file=sys.stderr, flush=True)
            document[name] = _measurements(options, f"{folder}/model")[name]()
    document["machine"]["load_after"] = list(os.getloadavg())
    document["machine"]["quiet"] = _quiet(document)
    line = json.dumps(document)
    target = _target(options, document["machine"])
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(report.table(document))
    print(line, flush=True)
    return 0


def _measurements(options: argparse.Namespace, folder: str) -> dict[str, Callable[[], Any]]:
    quick = options.quick
    size = model.SMALL if quick else model.FULL

    def on_disk() -> str:
        if not Path(folder).exists():
            from bench.ranks import Ranks

            with Ranks(1) as ranks:
                ranks.call("write_model", size, folder)
        return folder

    rounds = options.rounds or (1 if quick else 5)
    return {
        "speed": lambda: speed.measure(size, on_disk(), rounds, 0 if quick else options.timeout),
        "axes": lambda: speed.measure(size, on_disk(), rounds, 0 if quick else options.timeout, speed.AXES),
        "operations": lambda: operations.measure(size, on_disk(), rounds),
        "overhead": lambda: overhead.measure(size, on_disk(), 3 if quick else 30),
        "host": lambda: host.measure(50 if quick else 500),
        "memory": lambda: memory.measure(size, on_disk()),
        "startup": lambda: startup.measure(1 if quick else 3),
        "numerics": lambda: numerics.measure(size),
        "schedules": lambda: schedules.measure(size),
        "training": lambda: training.measure(training.SMALL if quick else training.FULL, rounds),
        "serve": lambda: serve.measure(1, 4) if quick else serve.measure(options.rounds or 3),
        "serve-texts": lambda: serve_texts.measure(serve_texts.SMALL if quick else serve_texts.Size(), rounds),
    }


def _quiet(document: dict[str, Any]) -> bool:
    timed = [
        document[name]["most_used_by_others"] for name in ("speed", "axes", "serve", "serve-texts") if name in document
    ]
    if timed:
        return max(timed) <= machine.QUIET
    return document["machine"]["load_before"][0] < 0.5


def _target(options: argparse.Namespace, about: dict[str, Any]) -> Path | None:
    if options.output:
        return Path(options.output)
    if options.quick:
        return None
    only = "".join(f"-{name}" for name in options.only or ())  # one measurement must not replace the file of another
    return RESULTS / f"{about['date'][:10]}-{machine.short_name()}-{about['commit']}{only}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: a test that the bench works")
    parser.add_argument("--only", action="append", choices=NAMES, help="one measurement; may be given several times")
    parser.add_argument("--rounds", type=int, help="rounds of the speed measurement (5)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a quiet moment before each run")
    parser.add_argument("--output", help="where the JSON document goes instead of bench/results/")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
