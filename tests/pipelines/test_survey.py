"""The mechanism tried on the transformers and UNets of diffusers: the same bits as plain, or refused with a reason."""

from __future__ import annotations

import pytest

from tests.support.ranks import run_ranks
from tests.support.survey_models import FAST, Entry, all_entries
from tests.support.survey_runs import survey

RUNS = {2: (1, 3), 4: (1,)}
"""Number of ranks -> numbers of chunks per rank."""


def check(entries: list[Entry], size: int, timeout: float) -> None:
    """Survey the entries on `size` ranks; check that every outcome equals that of the table, on every rank."""
    results = run_ranks(size, survey, [entry.id for entry in entries], RUNS[size], timeout=timeout)
    wrong = []
    for rank, outcomes in enumerate(results):
        for outcome in outcomes:
            entry = next(e for e in entries if e.id == outcome.id)
            where = f"rank {rank}, {outcome.chunks} chunks, {outcome.id}"
            if entry.refused is not None:
                if entry.refused not in (outcome.refused or ""):
                    wrong.append(f"{where}: was to be refused ({entry.refused}), but: {outcome}")
            elif outcome.error or outcome.refused or outcome.strangers:
                wrong.append(f"{where}: {outcome.error or outcome.refused or outcome}")
        if len(outcomes) != len(entries) * len(RUNS[size]):
            wrong.append(f"rank {rank}: ended after {len(outcomes)} runs")
    wrong += [
        f"{of_ranks[0].id}: fewer than two ranks ran blocks"
        for of_ranks in zip(*results, strict=False)
        if of_ranks[0].refused is None and sum(outcome.ran > 0 for outcome in of_ranks) < 2
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_products_and_other_structures(size: int) -> None:
    check(list(FAST), size, 200)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", list(RUNS))
def test_every_class(size: int) -> None:
    check(all_entries(), size, 800)
