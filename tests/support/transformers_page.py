"""The section on transformers and UNets of docs/supported-models.md, measured: every class of the survey on two ranks.

`python -m tests.support.transformers_page` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from shardit import DiffusionParallelConfig, InputError
from shardit.core.comm.mesh import init_mesh
from shardit.core.modules.hints import Plan
from shardit.core.runtime.pending import materialize
from shardit.diffusion.family import wrap_attention_back_ends
from shardit.parallel.sequence.choose import shard_tokens
from tests.parallel import test_tensor
from tests.support import survey_models
from tests.support.matrix_page import put_section
from tests.support.ranks import run_ranks
from tests.support.survey_models import Draw, all_entries
from tests.support.survey_runs import Outcome, survey

HEADING = "## Transformers and UNets"

HEAD = f"""{HEADING}

Written by `make transformers` from what it measured; not by hand. One class each, tiny and with random weights, called
alone in float32 on two ranks: `=` is the same bits as plain diffusers in five calls of two sizes, a number the relative
L2 distance of one call, `*` that a kind of block runs on all tokens on both ranks, its operations partitioned over
them.

"""

CHUNKS = {"pp 2": 1, "pp 2 looped": 3}
"""Chunks for each rank, by column."""

TOKENS: dict[str, dict[str, Any]] = {"ulysses 2": {"ulysses_degree": 2}, "ring 2": {"ring_degree": 2}}
"""Configurations that shard tokens, by column."""

FAILED = "failed"


class Partitioned(float):
    """The distance of a class of which some blocks run on all tokens, their operations partitioned."""


Found = Mapping[str, float | str]
"""The distance from the plain model, or why it was refused, by class."""


def run_sharded(rank: int, count: int, method: str, ids: Sequence[str], config: dict[str, Any]) -> Found:
    """One call of each class with its tokens over the ranks."""
    mesh = init_mesh(DiffusionParallelConfig(**config), device="cpu", rank=rank, init_method=method, timeout_s=60)
    wrap_attention_back_ends()
    found: dict[str, float | str] = {}
    for entry in map(survey_models.entry, ids):
        model, extra = entry.build(), {"return_dict": False} if entry.returns else {}
        with torch.no_grad():
            expected = model(**entry.inputs(Draw(0, False)), **extra)
            try:
                shard_tokens(model, mesh, None, Plan(order=entry.order, replicate=entry.replicate))
                got = model(**entry.inputs(Draw(0, False)), **extra)
                materialize(got)
            except InputError as error:
                found[entry.id] = str(error)
                continue
        pairs = list(zip(tree_leaves(expected), tree_leaves(got), strict=True))
        if any(a.shape != b.shape for a, b in pairs if isinstance(a, torch.Tensor)):
            found[entry.id] = f"{FAILED}: some of its outputs have the tokens of one rank alone"
            continue
        tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point()]
        distance = max(test_tensor.distance(a, b) for a, b in tensors)
        found[entry.id] = Partitioned(distance) if getattr(model.shardit_sequence, "partitioned", ()) else distance
    return found


def stages_cell(outcomes: list[Outcome]) -> str:
    """What the table says of a class over stages, from what each rank found."""
    if any(outcome.error for outcome in outcomes):
        return "failed"
    return "refused" if any(outcome.refused for outcome in outcomes) else "="


def number_cell(found: float | str) -> str:
    """What the table says of a class over slices or sharded tokens."""
    if isinstance(found, str):
        return FAILED if found.startswith(FAILED) else "refused"
    return f"{found:.0e}" * bool(found) + "=" * (not found) + "*" * isinstance(found, Partitioned)


def short(reason: str) -> str:
    """Return an error without the shapes of arguments and what to do."""
    return re.sub(r" \(its arguments .* ways were tried(.*)\): set ulysses.*", r"\1", reason)


def render(stages: Mapping[tuple[str, int], list[Outcome]], others: Mapping[str, Found]) -> str:
    """The section. others: what was found on each of the other axes, by column."""
    names = sorted({name for name, _ in stages})
    rows = [["class", *CHUNKS, *others], ["---"] * (len(CHUNKS) + len(others) + 1)]
    for name in names:
        cells = [stages_cell(stages[name, chunks]) for chunks in CHUNKS.values()]
        rows.append([name, *cells, *(number_cell(found[name]) for found in others.values())])
    reasons = [(name, "pp 2", outcomes[0].refused) for (name, _), outcomes in stages.items() if outcomes[0].refused]
    reasons += [(n, way, text) for way, found in others.items() for n, text in found.items() if isinstance(text, str)]
    lines = [f"- {name}, {way}: {short(reason)}" for name, way, reason in sorted(set(reasons))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    heading = "\n\nRefused, with the error (that of sharded tokens without the shapes):\n\n"
    return HEAD + table + (heading + "\n".join(lines) if lines else "") + "\n"


if __name__ == "__main__":
    ids = [entry.id for entry in all_entries()]
    found: dict[tuple[str, int], list[Outcome]] = {}
    for outcomes in run_ranks(2, survey, ids, tuple(CHUNKS.values()), timeout=1800):
        for outcome in outcomes:
            found.setdefault((outcome.id, outcome.chunks), []).append(outcome)
    others: dict[str, Found] = {"tp 2": run_ranks(2, test_tensor.survey, ids, timeout=1800)[0]}
    others |= {way: run_ranks(2, run_sharded, ids, config, timeout=1800)[0] for way, config in TOKENS.items()}
    put_section(HEADING, render(found, others))
