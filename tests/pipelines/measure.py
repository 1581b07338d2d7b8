"""Measures the survey: `python -m tests.pipelines.measure [--plain] [--axes "pp 2,tp 2"] [--left] [NAME ...]`."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.pipelines.entry import entries
from tests.pipelines.runs import AXES, KINDS, Outcome, plain_result, ranks_of, survey
from tests.support.ranks import RanksFailed, run_ranks

RESULTS = Path(__file__).parent.parent.parent / "build" / "pipelines"


def measure(tasks: Sequence[tuple[str, str]], timeout: float) -> list[Outcome]:
    """The outcome of every (class name, axis); all axes have the same number of ranks. After a failure the rest goes on
    in a new group."""
    found: list[Outcome] = []
    (count,) = {ranks_of(axis) for _, axis in tasks}
    while len(found) < len(tasks):
        left = tasks[len(found) :]
        with tempfile.TemporaryDirectory() as folder:
            said = ""
            try:
                run_ranks(count, survey, left, folder, timeout=timeout)
            except RanksFailed as error:
                said = str(error)
            files = [Path(folder, f"{rank}.jsonl") for rank in range(count)]
            lines = [f.read_text(encoding="utf-8").splitlines() if f.exists() else [] for f in files]
        of_ranks = [[Outcome(**json.loads(line)) for line in of_rank] for of_rank in lines]
        done = [merged(pair) for pair in zip(*of_ranks, strict=False)]
        if len(done) < len(left) and (not done or done[-1].kind != "failed"):
            at = left[len(done)]
            told = [o.message for of_rank in of_ranks for o in of_rank[len(done) :]]
            done.append(Outcome(*at, "failed", message="\n".join([*told, said or "no answer in time"])))
        found += done
    return found


def merged(of_ranks: Sequence[Outcome]) -> Outcome:
    """Merge the results of all ranks for one task: the worst outcome, and the largest share."""
    # Of several that failed, the one that did not fail because of the other says more.
    worst = max(of_ranks, key=lambda o: (KINDS.index(o.kind), "communication failed" not in o.message, o.distance))
    if worst.kind == "refused" and any(outcome.kind != "refused" for outcome in of_ranks):
        worst.kind = "failed"
    worst.held = max(outcome.held for outcome in of_ranks)
    return worst


def note(outcomes: Sequence[Outcome], results: Path = RESULTS) -> None:
    """Store the measurements: one file for each class."""
    results.mkdir(parents=True, exist_ok=True)
    for outcome in outcomes:
        file = results / f"{outcome.name}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        known[outcome.axis] = vars(outcome)
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def known(results: Path = RESULTS) -> dict[tuple[str, str], Outcome]:
    """Return the stored measurements."""
    files = sorted(results.glob("*.json"))
    found = [Outcome(**o) for file in files for o in json.loads(file.read_text(encoding="utf-8")).values()]
    return {(outcome.name, outcome.axis): outcome for outcome in found}


def try_plain(names: Sequence[str]) -> None:
    """Print the library's own result for each class."""
    for name in names:
        start = time.monotonic()
        try:
            leaves, size = plain_result(entries()[name])
            shapes = ", ".join(str(leaf.shape) for leaf in leaves[:4])
            print(f"ok    {name}: {shapes}, {size} parameters, {time.monotonic() - start:.1f} s", flush=True)
        except Exception:
            said = traceback.format_exc(limit=-1).strip().splitlines()[1:]
            print(f"FAILS {name}: {' '.join(line.strip() for line in said)[:400]}", flush=True)


def _is_asked(name: str, asked: Sequence[str]) -> bool:
    return any(name == pattern or (pattern[0] == "~" and pattern[1:] in name) for pattern in asked)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="class names, or parts of names after a '~'")
    parser.add_argument("--plain", action="store_true", help="only plain, in this process")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--left", action="store_true", help="only what is not known to be right or refused")
    parser.add_argument("--size", type=int, default=30, help="tasks in a group")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for a group")
    asked = parser.parse_args()
    names = [
        n for n in entries() if not asked.names or any(n == a or (a[0] == "~" and a[1:] in n) for a in asked.names)
    ]
    if asked.plain:
        return try_plain(names)
    tasks = [(name, axis) for name in names for axis in asked.axes.split(",")]
    if asked.left:
        fine = {task for task, outcome in known(asked.results).items() if outcome.kind == "right"}
        tasks = [task for task in tasks if task not in fine]
    for start in range(0, len(tasks), asked.size):
        outcomes = measure(tasks[start : start + asked.size], asked.timeout)
        note(outcomes, asked.results)
        for o in outcomes:
            last = o.message.strip().splitlines()[-1][:300] if o.message.strip() else ""
            print(f"{o.kind:8}{o.axis:12} {o.name} {o.distance:.0e} held {o.held:.2f} {last}", flush=True)
    return None


if __name__ == "__main__":
    main()
