"""What stays whole on every tensor rank is logged: a warning if it is much of the model."""

from __future__ import annotations

import logging
from typing import Any

import torch

import shardit
from shardit.parallel.tensor import apply
from tests.diffusion.test_parallelize import join
from tests.support.ranks import run_ranks
from tests.support.survey_models import entry


def logged(rank: int, size: int, method: str) -> list[tuple[int, str]]:
    """Shard a model as it is, then one with a large table that is never cut; return level and text of the log lines."""
    join(rank, size, method)
    lines: list[tuple[int, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelno, record.getMessage()))
    apply.log.addHandler(handler)
    apply.log.setLevel(logging.INFO)
    apply.MANY = 1000  # a real model has millions
    for extra in (0, 100_000):
        model: Any = entry("FluxTransformer2DModel").build()
        if extra:
            model.table = torch.nn.Parameter(torch.zeros(extra))
        shardit.parallelize(model, tensor_parallel_size=2, timeout_s=60)
    return [line for line in lines if "whole on every tensor rank" in line[1]]


def test_a_large_share_is_a_warning() -> None:
    first, second = run_ranks(2, logged)
    (usual, few), (warning, many) = first
    assert (usual, warning) == (logging.INFO, logging.WARNING)
    assert few.startswith(
        "FluxTransformer2DModel: 1.1% of its parameters are whole on every tensor rank (context_embed"
    )
    assert many.startswith("FluxTransformer2DModel: 32.4% of its parameters are whole on every tensor rank (table, ")
    assert second == []  # the first rank speaks for all
