"""Writes docs/supported-models.md from the results of test_matrix.py: `python -m tests.support.matrix_page`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "supported-models.md"
RESULTS = ROOT / "build" / "matrix"
SURVEY = "## Every pipeline class"
"""Where the part of the page begins that tests/pipelines/table.py writes."""

WAYS: dict[str, dict[str, int]] = {
    "pp 2": {"pipeline_parallel_size": 2, "pipeline_chunks": 1},
    "pp 2 looped": {"pipeline_parallel_size": 2, "pipeline_chunks": 2},
    "cfg 2": {"cfg_parallel_size": 2},
    "dp 2": {"data_parallel_size": 2},
    "ulysses 2": {"ulysses_degree": 2},
    "ring 2": {"ring_degree": 2},
    "tp 2": {"tensor_parallel_size": 2},
    "pp 3": {"pipeline_parallel_size": 3},
    "ulysses 3": {"ulysses_degree": 3},
    "ring 3": {"ring_degree": 3},
    "tp 3": {"tensor_parallel_size": 3},
}
"""Columns of the page: arguments of DiffusionParallelConfig."""

HEAD = """# Supported models

Written by `make matrix` from what the tests measured; not by hand. Each cell is a whole tiny pipeline with guidance, in
float32, against plain diffusers on one rank: `=` is the same bits, a number the relative L2 distance of the pixels. The
tiny models have the real classes and few, narrow layers; 3 ranks divide neither their heads nor their lengths.

"""


def note(name: str, found: dict[str, float]) -> None:
    """Store the results of a model."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**known, **found}, indent=1) + "\n", encoding="utf-8")


def render(results: Path, names: tuple[str, ...]) -> str:
    """Return the page. SystemExit names missing results."""
    rows = []
    for name in names:
        file = results / f"{name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        missing = [way for way in WAYS if way not in found]
        if missing:
            sys.exit(f"not measured, {name}: {', '.join(missing)}")
        rows.append([name, *("=" if found[way] == 0 else f"{found[way]:.0e}" for way in WAYS)])
    table = [["model", *WAYS], ["---"] * (len(WAYS) + 1), *rows]
    return HEAD + "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"


def put_section(heading: str, section: str) -> None:
    """Put a section into the page: in place of the one with its heading, else behind the first one."""
    first, *others = PAGE.read_text(encoding="utf-8").split("\n## ")
    kept = [other for other in others if f"## {other}".split("\n")[0] != heading]
    at = next((i for i, other in enumerate(others) if f"## {other}".split("\n")[0] == heading), 0)
    kept.insert(at, section.removeprefix("## "))
    PAGE.write_text("\n## ".join([first, *kept]), encoding="utf-8")


if __name__ == "__main__":
    from shardit.models import tiny

    _, heading, others = PAGE.read_text(encoding="utf-8").partition("\n## ")
    PAGE.write_text(render(RESULTS, tiny.names()) + heading + others, encoding="utf-8")
