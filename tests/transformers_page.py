"""The section on transformers and UNets of docs/supported-models.md: `python -m tests.transformers_page` measures every
class of the survey on two ranks, and writes it."""

from __future__ import annotations

from collections.abc import Mapping

from tests import test_tensor
from tests.matrix_page import PAGE
from tests.ranks import run_ranks
from tests.survey_models import all_entries
from tests.survey_runs import Outcome, survey

HEADING = "## Transformers and UNets"

HEAD = f"""{HEADING}

Written by `make transformers` from what it measured; not by hand. One class each, tiny and with random weights, called
alone in float32 on two ranks: `=` is the same bits as plain diffusers in five calls of two sizes, a number the relative
L2 distance of one call.

"""

CHUNKS = {"pp 2": 1, "pp 2 looped": 3}
"""Chunks for each rank, by column."""


def stages_cell(outcomes: list[Outcome]) -> str:
    """What the table says of a class over stages, from what each rank found."""
    if any(outcome.error for outcome in outcomes):
        return "failed"
    return "refused" if any(outcome.refused for outcome in outcomes) else "="


def render(stages: Mapping[tuple[str, int], list[Outcome]], slices: Mapping[str, float | str]) -> str:
    """The section."""
    rows = [["class", *CHUNKS, "tp 2"], ["---"] * (len(CHUNKS) + 2)]
    for name in sorted(slices):
        tensor = slices[name]
        cells = [stages_cell(stages[name, chunks]) for chunks in CHUNKS.values()]
        rows.append([name, *cells, "refused" if isinstance(tensor, str) else f"{tensor:.0e}" if tensor else "="])
    reasons = {name: outcomes[0].refused for (name, chunks), outcomes in stages.items() if outcomes[0].refused}
    lines = [f"- {name}, pp 2: {reason}" for name, reason in sorted(reasons.items())]
    lines += [f"- {name}, tp 2: {reason}" for name, reason in sorted(slices.items()) if isinstance(reason, str)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return HEAD + table + ("\n\nRefused, with the error:\n\n" + "\n".join(lines) if lines else "") + "\n"


def write(section: str) -> None:
    """Put the section behind the first one of the page."""
    first, *others = PAGE.read_text(encoding="utf-8").split("\n## ")
    others = [other for other in others if f"## {other}".split("\n")[0] != HEADING]
    PAGE.write_text("\n## ".join([first, section.removeprefix("## "), *others]), encoding="utf-8")


if __name__ == "__main__":
    ids = [entry.id for entry in all_entries()]
    found: dict[tuple[str, int], list[Outcome]] = {}
    for outcomes in run_ranks(2, survey, ids, tuple(CHUNKS.values()), timeout=1800):
        for outcome in outcomes:
            found.setdefault((outcome.id, outcome.chunks), []).append(outcome)
    write(render(found, run_ranks(2, test_tensor.survey, ids, timeout=1800)[0]))
