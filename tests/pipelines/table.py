"""Writes the section on pipelines of docs/supported-models.md from measurements: `python -m tests.pipelines.table`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping

from tests.pipelines.entry import entries, not_built, pipeline_classes
from tests.pipelines.measure import known
from tests.pipelines.runs import AXES, Outcome
from tests.support.matrix_page import PAGE, SURVEY

HEAD = """

Written by `make survey` from what the tests measured; not by hand. Every pipeline class of the installed diffusers that
can be built tiny, one whole call of two steps in float32 against plain diffusers in the same process: `=` is the same
bits, a number the relative L2 distance of the output, `*` that one rank holds nearly all weights. `refused` is an error
of one line on all ranks, listed below the table; on `cfg 2` a pipeline that puts both branches of guidance into one
call keeps it whole (`split_batch=False`).

"""

CUTS_WEIGHTS = ("pp", "tp")
"""Axes that spread the parameters; on the others every rank has all of them."""

WHOLE = 0.95
"""Share of all parameters on one rank from which on hardly anything was cut."""

Results = Mapping[tuple[str, str], Outcome]


def cell(outcome: Outcome) -> str:
    """Return the table's text for one outcome."""
    if outcome.kind != "right":
        return outcome.kind
    whole = " *" if outcome.held > WHOLE and outcome.axis.startswith(CUTS_WEIGHTS) else ""
    return ("=" if outcome.distance == 0 else f"{outcome.distance:.0e}") + whole


def counts(results: Results, names: list[str]) -> list[str]:
    """One line for each axis."""
    lines = []
    for axis in AXES:
        kinds = Counter(results[name, axis].kind for name in names)
        right = kinds["right"] / max(len(names), 1)
        rest = ", ".join(f"{kinds[kind]} {kind}" for kind in ("refused", "failed", "wrong"))
        lines.append(f"- {axis}: of {len(names)} pipelines {kinds['right']} right ({right:.0%}), {rest}")
    return lines


def said(outcome: Outcome) -> str:
    """The last line of a message, short."""
    lines = outcome.message.strip().splitlines()
    return (lines[-1] if lines else "").replace("|", "/")[:200]


def render(results: Results) -> str:
    """Return the section. SystemExit names missing measurements."""
    missing = [f"{name} {axis}" for name in entries() for axis in AXES if (name, axis) not in results]
    if missing:
        sys.exit(f"not measured: {', '.join(missing)}")
    plain = [name for name in entries() if any(results[name, axis].kind == "plain" for axis in AXES)]
    names = sorted(set(entries()) - set(plain))
    rows = [[name, *(cell(results[name, axis]) for axis in AXES)] for name in names]
    table = [["pipeline", *AXES], ["---"] * (len(AXES) + 1), *rows]
    parts = [SURVEY + HEAD + "\n".join(f"| {' | '.join(row)} |" for row in table), "\n".join(counts(results, names))]
    others = [results[name, axis] for name in names for axis in AXES if results[name, axis].kind != "right"]
    if others:
        parts += ["Refused, with the error:", "\n".join(f"- {o.name}, {o.axis}: {said(o)}" for o in others)]
    reasons = {name: f"plain diffusers fails here: {said(results[name, 'pp 2'])}" for name in plain}
    reasons |= {name: reason for name, reason in pipeline_classes().items() if reason and name not in entries()}
    reasons |= not_built()
    if reasons:
        parts += ["Not tried:", "\n".join(f"- {name}: {reason}" for name, reason in sorted(reasons.items()))]
    return "\n\n".join(parts) + "\n"


def write() -> None:
    """Put the section into the page: where it was, else at the end."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition(f"\n{SURVEY}")
    _, heading, others = after.partition("\n## ")
    PAGE.write_text(f"{before.rstrip()}\n\n{render(known())}{heading}{others}", encoding="utf-8")


if __name__ == "__main__":
    write()
