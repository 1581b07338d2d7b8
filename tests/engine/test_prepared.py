"""Models that the fork server builds on meta before ranks start: a rank loads into its copy, and builds nothing
again."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from shardit import DiffusionParallelConfig
from shardit.engine.process.messages import SessionSpec
from shardit.engine.session import Session, check
from shardit.models import tiny
from tests.support.ranks import run_ranks

SPEC = SessionSpec("tiny/flux", DiffusionParallelConfig(pipeline_parallel_size=2), "bfloat16", "cpu", timeout_s=60)


def loaded(rank: int, count: int, method: str) -> list[str]:
    check(SPEC)
    with mock.patch("shardit.api.prepare", side_effect=AssertionError("built again")):
        session = Session(SPEC, rank=rank, world_size=count, init_method=method)
        parts = [part for part in session.model.pipe.components.values() if isinstance(part, torch.nn.Module)]
        with pytest.raises(AssertionError, match="built again"):  # it is used up
            Session(SPEC, rank=rank, world_size=count, init_method=f"{method}-2")
        check(SPEC)
        with pytest.raises(AssertionError, match="built again"):  # this one is for another dtype
            Session(dataclasses.replace(SPEC, dtype="float32"), rank=rank, world_size=count, init_method=f"{method}-3")
    return sorted({str(parameter.dtype) for part in parts for parameter in part.parameters()})


def test_a_rank_loads_into_what_is_built() -> None:
    tiny.resolve("tiny/flux")
    assert run_ranks(2, loaded) == [["torch.bfloat16"], ["torch.bfloat16"]]
