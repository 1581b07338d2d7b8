"""Every class of the survey with its tokens over two ranks."""

from __future__ import annotations

import pytest

from tests.parallel.sequence.test_partitioned import CLOSE
from tests.support.ranks import run_ranks
from tests.support.survey_models import all_entries
from tests.support.transformers_page import TOKENS, run_sharded

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
