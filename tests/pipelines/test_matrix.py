"""Every tiny model on every axis, whole pipelines against plain diffusers. `make matrix` runs this and writes the table
of docs/supported-models.md from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardit.models import tiny
from tests.pipelines.test_pipelines import BATCHED, guidance, reference
from tests.support import matrix_page
from tests.support.ranks import run_ranks
from tests.support.whole_pipelines import Case, difference, joined, staged

BITWISE = ("pp 2", "pp 2 looped", "pp 3", "cfg 2", "dp 2")
CLOSE = 1e-5


def case(name: str, way: str) -> Case:
    """A model on a way of the page, with guidance, one request for each copy."""
    sizes = dict(matrix_page.WAYS[way])
    pp, chunks = sizes.pop("pipeline_parallel_size", 1), sizes.pop("pipeline_chunks", None)
    requests = sizes.get("data_parallel_size", 1)
    return Case(name, pp, chunks, requests=requests, split_batch="cfg" in way, call=guidance(name), axes=sizes)


def measure(name: str, count: int) -> dict[str, float]:
    """The distance from plain diffusers for every way of `count` ranks: 0 where every bit is the same."""
    tiny.resolve(f"tiny/{name}")
    ways = [way for way in matrix_page.WAYS if case(name, way).config().world_size == count]
    cases = [case(name, way) for way in ways]
    results = run_ranks(count, staged, cases, timeout=850)
    return {way: distance(cases[n], [result[n] for result in results]) for n, way in enumerate(ways)}


def distance(case: Case, of_ranks: list[dict[str, Any]]) -> float:
    """The largest of all requests of a case."""
    assert joined(of_ranks, "errors") == [None] * case.requests
    assert not any(result["strangers"] for result in of_ranks)
    pairs = list(zip(reference(case), joined(of_ranks, "arrays"), strict=True))
    return max(0.0 if np.array_equal(a, b) else difference(a, b) for a, b in pairs)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", tiny.names())
def test_every_model_on_every_axis(name: str, count: int) -> None:
    found = measure(name, count)
    for way, error in found.items():
        exact = way in BITWISE and not (way.startswith("cfg") and name in BATCHED)
        assert error <= (0 if exact else CLOSE), (name, way, error)
    matrix_page.note(name, found)


def test_the_page_has_every_model_and_way() -> None:
    text = matrix_page.PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    rows = {
        line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ") and "---" not in line
    }
    assert set(rows) == {"model", *tiny.names()}
    assert all(len(row.split("|")) == len(matrix_page.WAYS) + 3 for row in rows.values())
    assert all(cell.strip() for row in rows.values() for cell in row.split("|")[1:-1])


def test_a_page_needs_all_results(tmp_path: Path) -> None:
    (tmp_path / "flux.json").write_text(json.dumps({"pp 2": 0.0}), encoding="utf-8")
    with pytest.raises(SystemExit, match="flux: pp 2 looped"):
        matrix_page.render(tmp_path, ("flux",))
