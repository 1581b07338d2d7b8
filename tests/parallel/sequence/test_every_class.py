"""Every class of the survey with its tokens over two ranks."""

from __future__ import annotations

import re

import pytest

from tests.parallel.sequence.test_partitioned import CLOSE
from tests.support import whole_share
from tests.support.matrix_page import PAGE
from tests.support.ranks import run_ranks
from tests.support.survey_models import all_entries
from tests.support.transformers_page import CHUNKS, HEADING, TOKENS, run_sharded

REFUSED = {"ring 2": {"AnyFlowFARTransformer3DModel"}}
"""Attention that Ring has no kernel for."""


@pytest.mark.full
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("way", list(TOKENS))
def test_every_class_over_sequence_ranks(way: str) -> None:
    ids = [entry.id for entry in all_entries()]
    for found in run_ranks(2, run_sharded, ids, TOKENS[way], timeout=1800):
        assert list(found) == ids
        assert {name for name, outcome in found.items() if isinstance(outcome, str)} == REFUSED.get(way, set()), found
        far = {name: outcome for name, outcome in found.items() if isinstance(outcome, float) and outcome > 2 * CLOSE}
        assert not far


def rows_of(heading: str) -> dict[str, list[str]]:
    """The rows of the first table of a section of docs/supported-models.md, by their first cell."""
    section = PAGE.read_text(encoding="utf-8").partition(f"{heading}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)[2:]
    return {name: cells for name, *cells in (line.split(" | ") for line in lines)}


def test_the_page_has_every_class_on_every_axis() -> None:
    rows = rows_of(HEADING)
    assert set(rows) == {entry.id for entry in all_entries()}
    assert {len(cells) for cells in rows.values()} == {len(CHUNKS) + 1 + len(TOKENS)}
    assert not [name for name, cells in rows.items() if "failed" in cells]


def test_the_page_has_the_share_that_stays_whole_of_every_model() -> None:
    rows = rows_of(whole_share.HEADING)
    assert set(rows) == {name.rpartition(":")[2] for name in whole_share.MODELS}
    assert all(float(share) <= 0.01 for _, *shares, _ in rows.values() for share in shares)
