"""Gradients over two stages are those of one rank, for every family."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.training.diffusion.folders import FIRST_FRAME, TINY, UNETS, model_of
from tests.training.diffusion.runs import gradients

FOLDERS = {name: model_of(name) for name in (*UNETS, FIRST_FRAME)}


def check(of_ranks: list[Any], names: tuple[str, ...]) -> None:
    for name in names:
        for model in of_ranks[0][name]:
            for rank in of_ranks:
                found = rank[name][model]
                assert found["worst"] <= found["bound"] < 2e-5, (name, model, found)
                assert found["loss"] < 2e-6, (name, model, found)
                assert found["only"] == [], (name, model, found)
                assert found["compared"] > 0, (name, model)
        assert len(of_ranks[0][name]) == (2 if name in ("wan2.2-t2v", "wan2.2-i2v") else 1)


@pytest.mark.parametrize("names", [TINY[:3], (FIRST_FRAME, *TINY[3:5]), TINY[5:], UNETS])
def test_a_lora_over_two_stages(names: tuple[str, ...]) -> None:
    check(run_ranks(2, gradients, list(names), FOLDERS, timeout=200), names)


def test_text_encoders_that_are_trained_over_two_stages() -> None:
    more = {"train_text_encoder": True, "caption_dropout": 0.3}
    of_ranks = run_ranks(2, gradients, ["sdxl", "sd"], FOLDERS, more, timeout=200)
    check(of_ranks, ("sdxl", "sd"))
    for rank in of_ranks:
        assert rank["sdxl"]["unet"]["of_text"] == 24  # the last layer of the first encoder is not used
        assert rank["sd"]["unet"]["of_text"] == 16


TENSOR = "tensor_parallel_size"


@pytest.mark.parametrize("names", [("wan2.2-t2v", "flux"), pytest.param(TINY, marks=pytest.mark.full)])
def test_a_lora_over_two_tensor_ranks(names: tuple[str, ...]) -> None:
    check(run_ranks(2, gradients, list(names), FOLDERS, (), TENSOR, timeout=200), names)


def test_text_encoders_stay_whole_on_tensor_ranks() -> None:
    more = {"train_text_encoder": True, "caption_dropout": 0.3}
    check(run_ranks(2, gradients, ["sdxl"], FOLDERS, more, TENSOR, timeout=200), ("sdxl",))
