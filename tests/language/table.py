"""Measures language models, and writes their section of docs/supported-models.md: `python -m tests.language.table`.

What is measured is kept in build/, so that a run goes on where the last one ended. --write: only writes the section.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.language_peers import peer_of
from shardit import DiffusionParallelConfig
from shardit.core.comm.mesh import init_mesh
from tests.language import families
from tests.language.cases import CASES
from tests.language.survey import buildable, outcome_of, survey
from tests.support.matrix_page import put_section
from tests.support.paths import ROOT
from tests.support.ranks import RanksFailed, run_ranks

STORE = ROOT / "build" / "language.json"
HEADING = "## Language models"
PEER = "transformers, pp 2"
AXES = {"pp 2": "pipeline_parallel_size", "tp 2": "tensor_parallel_size"}
COLUMNS = (*(case.name for case in CASES), "batches")

HEAD = f"""{HEADING}

Written by `make languages` from what it measured; not by hand. Every family of causal language models of transformers
that can be built tiny, in float32 against one rank. Over two stages (the first columns) `=` is the same tokens and the
same bits of all logits, `-` what one rank cannot do; `batches` are prompts that join and leave as `LLM` runs them. On
two tensor ranks (`tp 2`) tokens are equal and logits close. The last column is pipeline parallelism of transformers
itself on two ranks: the cases whose tokens are not those of one rank, or that fail; nothing where it was not tried.

"""

Found = Mapping[str, Sequence[str]]
"""The results of a family by column group: "pp 2", "tp 2", `PEER`."""


def measure_peer(rank: int, count: int, method: str, name: str) -> list[str]:
    """Return the results of the cases with pipeline parallelism of transformers."""
    init_mesh(DiffusionParallelConfig(pipeline_parallel_size=count), device="cpu", init_method=method, rank=rank)
    plain, results = families.make(name), []
    peer = peer_of(lambda: families.make(name), rank, count, "pp_size")
    for case in CASES:
        try:
            expected = case(plain).sequences
        except Exception:
            results.append("not on one rank")
            continue
        try:
            results.append("right" if torch.equal(case(peer).sequences, expected) else "other tokens")
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}"[:200])
    return results


def of_peer(name: str) -> list[str]:
    """Return the results of `measure_peer`; of a family that ends the ranks, or hangs, that alone."""
    try:
        one, other = run_ranks(2, measure_peer, name, timeout=60)
        return [a if b in ("right", "not on one rank") else b for a, b in zip(one, other, strict=True)]
    except RanksFailed as error:
        return [f"ended: {str(error).strip().splitlines()[-1]}"[:200]]


def measure() -> None:
    """Measure what is not in the store yet."""
    known = json.loads(STORE.read_text("utf-8")) if STORE.exists() else {"families": buildable(), "found": {}}
    found: dict[str, dict[str, Any]] = known["found"]

    def note(name: str, column: str, results: list[str]) -> None:
        found.setdefault(name, {})[column] = results
        STORE.parent.mkdir(exist_ok=True)
        STORE.write_text(json.dumps(known), "utf-8")
        print(name, column, results[0] if set(results) == {results[0]} else Counter(results), flush=True)

    for column, axis in AXES.items():
        for name, results, _ in survey([n for n in known["families"] if column not in found.get(n, {})], axis):
            note(name, column, results)
    for name in known["families"]:
        if PEER not in found[name]:
            note(name, PEER, of_peer(name))


def cell(result: str) -> str:
    """Return the table's text for one result."""
    texts = {"right": "=", "not on one rank": "-"}
    return texts.get(result, "refused" if result.startswith(("UnsupportedError", "InputError")) else "wrong")


def row(name: str, found: Found) -> list[str]:
    """Return the cells of a family."""
    stages = [*map(cell, found["pp 2"])]
    stages += [stages[0]] * (len(COLUMNS) - len(stages))  # refused as a whole
    return [name, *stages, outcome_of([*found["tp 2"]])[0], cell_of_peer(found.get(PEER, []))]


def cell_of_peer(results: Sequence[str]) -> str:
    """Return the cases that transformers' own parallelism does not do as one rank; nothing if it was not tried."""
    pairs = list(zip(COLUMNS, results, strict=False))
    wrong = [case for case, result in pairs if result not in ("right", "not on one rank")]
    ended = len(results) < len(CASES) or len(wrong) == sum(result != "not on one rank" for _, result in pairs)
    return ("all" if wrong and ended else ", ".join(wrong) or "=") if results else ""


def render(found: Mapping[str, Found]) -> str:
    """Return the section."""
    rows = [row(name, of) for name, of in sorted(found.items())]
    titles = ["family", *COLUMNS, "tp 2", PEER]
    table = [titles, ["---"] * len(titles), *rows]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    for column in AXES:
        kinds = Counter(outcome_of([*of[column]])[0] for of in found.values())
        lines.append(
            f"\n{column}: of {len(rows)} families {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}"
        )
    tried = [cells[-1] for cells in rows if cells[-1]]
    counts = f"{tried.count('=')} in all cases, {tried.count('all')} in none"
    lines.append(f"\n{PEER}: of {len(tried)} families tried, the tokens are those of one rank for {counts}")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--write" not in sys.argv:
        measure()
    put_section(HEADING, render(json.loads(STORE.read_text("utf-8"))["found"]))
