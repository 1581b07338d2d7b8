"""Runs on tensor ranks: they do as one rank, and go on at slices of any number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardit import InputError, RankError, UnsupportedError
from shardit.config import DiffusionParallelConfig
from shardit.training.run.checkpoint import find
from shardit.training.run.options.check import check_optimizer
from shardit.training.settings import TrainSettings
from tests.training.run.runs import apart, rows, run, same, weights

COMMON: dict[str, Any] = {
    "steps": 10,
    "accumulation": 2,
    "batch_size": 2,
    "repeats": 3,
    "ema_decay": 0.9,
    "data": "toy:5",
    "learning_rate": 1e-3,
    "save_every": 5,
}
TWO = {"tensor_parallel_size": 2}
CLOSE = 2e-5
"""Over ten steps of AdamW."""


pytestmark = pytest.mark.usefixtures("one_fork_server")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank without an interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert not run(output, model="toy still", **COMMON)
    return output


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two tensor ranks, with looks at what is trained."""
    output = tmp_path_factory.mktemp("sliced") / "run"
    looks = {"sample_every": 5, "sample_prompts": ("a",), "validate_every": 5, "validation_data": "toy:3"}
    assert not run(output, model="toy still", **COMMON, **TWO, **looks)
    return output


def interrupted(output: Path, **ranks: int) -> None:
    """Run until SIGKILL of the last rank in the seventh step; the words that said so are no other model."""
    count = ranks.get("tensor_parallel_size", 1) * ranks.get("pipeline_parallel_size", 1)
    with pytest.raises(RankError, match="killed by signal 9"):
        run(output, model=f"toy still kill:{count - 1}:7", **COMMON, **ranks)
    (only,) = find(output)
    file = only.folder / "run.json"
    file.write_text(file.read_text().replace(only.record["settings"]["model"], "toy still"))


def test_slices_train_as_one_rank(whole: Path, sliced: Path) -> None:
    assert apart(weights(sliced), weights(whole)) < CLOSE
    assert apart(weights(sliced / "ema"), weights(whole / "ema")) < CLOSE
    for one, other in zip(rows(sliced), rows(whole), strict=True):
        assert {one[key] for key in ("step", "lr", "samples")} == {other[key] for key in ("step", "lr", "samples")}
        assert one["items"] == other["items"]
        assert [one["loss"], one["grad_norm"]] == pytest.approx([other["loss"], other["grad_norm"]], rel=1e-4)
    assert [row["step"] for row in rows(sliced) if "held_out_loss" in row] == [5, 10]
    assert (sliced / "samples" / "step-00000010" / "decoder.txt").exists()


def test_a_killed_run_goes_on_to_the_same_bits(sliced: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    interrupted(output, **TWO)
    (only,) = find(output)
    assert only.record["files"] == ["stage-0.pt", "stage-0-slice-1.pt"]
    first, second = (torch.load(only.folder / name) for name in only.record["files"])
    assert first["parameters"].keys() > second["parameters"].keys() == second["places"].keys()
    assert not run(output, model="toy still", resume=True, **COMMON, **TWO)
    assert same(weights(output), weights(sliced))
    assert same(weights(output / "ema"), weights(sliced / "ema"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, TWO),
        (TWO, {}),
        (TWO, {"tensor_parallel_size": 4}),
        ({**TWO, "pipeline_parallel_size": 2}, TWO),
    ],
)
def test_the_number_of_tensor_ranks_may_change(
    before: dict[str, int], after: dict[str, int], whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    interrupted(output, **before)
    assert not run(output, model="toy still", resume=True, **COMMON, **after)
    assert apart(weights(output), weights(whole)) < CLOSE
    assert apart(weights(output / "ema"), weights(whole / "ema")) < CLOSE


def test_replicas_of_slices_share_out_the_optimizer(whole: Path, tmp_path: Path) -> None:
    given = {**COMMON, "accumulation": 1}
    run(tmp_path / "run", model="toy still", shard_optimizer=True, data_parallel_size=2, **given, **TWO)
    assert apart(weights(tmp_path / "run"), weights(whole)) < CLOSE
    names = find(tmp_path / "run")[0].record["files"]
    assert names == ["stage-0.pt", "stage-0-replica-1.pt", "stage-0-slice-1.pt", "stage-0-slice-1-replica-1.pt"]


def test_dropout_between_slices_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"self_attn cannot train: .* attention_dropout") as error:
        run(tmp_path / "run", model="toy", **COMMON, **TWO)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer", ["prodigy", "adafactor", "adamw8bit"])
def test_optimizers_of_whole_tensors_are_refused(optimizer: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"optimizer={optimizer} .* each of 2 tensor ranks"):
        check_optimizer(TrainSettings(optimizer=optimizer), DiffusionParallelConfig(tensor_parallel_size=2))
