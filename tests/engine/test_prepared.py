"""Models that the fork server builds on meta before ranks start: a rank loads into its copy, and builds nothing
again."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from shardit import DiffusionParallelConfig
from shardit.diffusion.sharding.layout import PipelineLayout, lay_out
from shardit.engine.llm import TASK
from shardit.engine.process.messages import SessionSpec
from shardit.engine.session import Session, check
from shardit.engine.tasks import language
from shardit.engine.tasks.task import task_of
from shardit.language.loading.source import DecoderSource, local_decoder
from shardit.language.options import LanguageOptions
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


def decoder_loaded(rank: int, count: int, method: str) -> list[int]:
    spec = dataclasses.replace(SPEC, model="tiny/llama", dtype=None, language=LanguageOptions(), task=TASK)
    check(spec)
    refused = mock.patch.object(DecoderSource, "tokenizer", side_effect=AssertionError("read again"))
    with mock.patch.object(language, "prepared_for", side_effect=AssertionError("built again")), refused:
        session = Session(spec, rank=rank, world_size=count, init_method=method)
    return session.model.tokenizer("a fox")["input_ids"]


def test_a_rank_of_a_language_model_has_what_is_built_and_the_tokenizer() -> None:
    source = local_decoder("tiny/llama")
    assert source is not None
    assert run_ranks(2, decoder_loaded) == [source.tokenizer()("a fox")["input_ids"]] * 2


class LaidOut(Exception):
    """Loading would now read weights."""


DEGREES: list[tuple[str, dict[str, int]]] = [
    ("flux", {"tensor_parallel_size": 2}),
    ("flux", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    ("qwen-image", {"tensor_parallel_size": 2, "cfg_parallel_size": 2}),
    ("wan2.2-t2v", {"tensor_parallel_size": 2, "vae_patch_parallel_size": 2}),
]


@pytest.mark.parametrize(("name", "degrees"), DEGREES, ids=str)
def test_the_check_and_loading_lay_out_alike(name: str, degrees: dict[str, int]) -> None:
    """Whatever the check before ranks start accepts, loading does not refuse, and each rank holds the same."""
    config = DiffusionParallelConfig(**degrees)
    spec = SessionSpec(f"tiny/{name}", config, device="cpu", max_in_flight=2)
    found: list[PipelineLayout] = []

    def noted(*args: Any, **kwargs: Any) -> PipelineLayout:
        found.append(lay_out(*args, **kwargs))
        return found[-1]

    mesh: Any = SimpleNamespace(member=lambda: 0, rank=0, device=torch.device("cpu"))
    with (
        mock.patch("shardit.engine.tasks.pipelines.lay_out", noted),
        mock.patch("shardit.api.lay_out", noted),
        mock.patch("shardit.api.load_pipeline", side_effect=LaidOut),
    ):
        check(spec)
        for _ in range(2):  # the second time without what the check has built
            with pytest.raises(LaidOut):
                task_of(spec).load(spec, mesh)
    checked, *loaded = found
    assert loaded == [checked, checked]
    assert any("encoder" in part for part in checked.cuts)
    assert checked.assignment.sliced == checked.cuts.keys()
