"""Slices over four ranks: classes of several families, with as many heads, give what one rank gives."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest

from tests.parallel.test_tensor import CLOSE, survey
from tests.support import survey_models
from tests.support.ranks import run_ranks
from tests.support.survey_models import Entry

IDS = (
    "WanVACETransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "SkyReelsV2Transformer3DModel-forcing",
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel-token-replace",
    "HunyuanVideo15Transformer3DModel",
    "CogVideoXTransformer3DModel",
    "ChromaTransformer2DModel",
    "BriaTransformer2DModel",
    "BriaFiboTransformer2DModel",
)


def with_four_heads(name: str) -> Entry:
    entry = survey_models.entry(name)
    assert "num_attention_heads" in entry.config
    return replace(entry, config={**entry.config, "num_attention_heads": 4})


def four(rank: int, count: int, method: str, ids: tuple[str, ...]) -> dict[str, float | str]:
    entries = {name: with_four_heads(name) for name in ids}
    with mock.patch.object(survey_models, "entry", entries.__getitem__):
        return survey(rank, count, method, ids)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [2, 4])
def test_families_of_pipelines(count: int) -> None:
    for found in run_ranks(count, four, IDS, timeout=500):
        assert list(found) == list(IDS)
        assert all(isinstance(outcome, float) and outcome <= 2 * CLOSE for outcome in found.values()), found
