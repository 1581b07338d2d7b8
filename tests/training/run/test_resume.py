"""Runs that end and go on: the same bits, the same rows, whatever the number of stages and replicas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shardit import InputError, RankError
from shardit.training.run.checkpoint import find
from shardit.training.run.steps.rates import rate
from tests.training.run.runs import apart, rows, run, same, spec, weights

COMMON: dict[str, Any] = {
    "steps": 12,
    "batch_size": 2,
    "repeats": 3,
    "caption_dropout": 0.5,
    "lr_schedule": "cosine",
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "data": "toy:5",
}
CLOSE = 2e-6


pytestmark = pytest.mark.usefixtures("one_fork_server")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank without an interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert not run(output, accumulation=4, **COMMON)
    return output


def killed_at(output: Path, rank: int, step: int, **given: Any) -> None:
    """Run until SIGKILL of a rank in a step."""
    with pytest.raises(RankError, match="killed by signal 9"):
        run(output, model=f"toy kill:{rank}:{step}", save_every=5, **COMMON, **given)
    assert [one.step for one in find(output)] == [5]


def go_on(output: Path, **given: Any) -> None:
    """Resume a run. The words of the model, which say when to die, are no other model."""
    assert not run(output, model="toy", resume=True, save_every=5, **{**COMMON, **given})


def rename_model(output: Path) -> None:
    """Let the checkpoint say that its run had the model without the words."""
    for one in find(output):
        file = one.folder / "run.json"
        file.write_text(file.read_text().replace(one.record["settings"]["model"], "toy"))


def test_five_steps_and_sigkill_and_seven_are_twelve(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    killed_at(output, 0, 8, accumulation=4)
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 5, 6, 7]
    rename_model(output)
    go_on(output, accumulation=4)
    assert same(weights(output), weights(whole))
    assert same(weights(output / "ema"), weights(whole / "ema"))
    assert apart(weights(whole), weights(whole / "ema")) > 1e-4
    assert rows(output) == rows(whole)
    assert [one.step for one in find(output)] == [12, 10]


@pytest.mark.parametrize("file", ["stage-0.pt", "run.json"])
def test_sigkill_while_a_checkpoint_is_written(file: str, whole: Path, tmp_path: Path) -> None:
    """The run goes on at the checkpoint before, to the same bits."""
    output = tmp_path / "run"
    with pytest.raises(RankError, match="killed by signal 9"):
        run(output, model=f"toy torn:{file}:10", save_every=5, accumulation=4, **COMMON)
    (torn,) = (output / "checkpoints").glob(f".partial-*/{file}")
    assert torn.stat().st_size > 0
    assert [one.step for one in find(output)] == [5]
    rename_model(output)
    go_on(output, accumulation=4)
    assert same(weights(output), weights(whole))
    assert same(weights(output / "ema"), weights(whole / "ema"))
    assert rows(output) == rows(whole)
    assert not list((output / "checkpoints").glob(".partial-*"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"pipeline_parallel_size": 2, "accumulation": 4}, {"pipeline_parallel_size": 2, "accumulation": 4}),
        ({"accumulation": 4}, {"pipeline_parallel_size": 2, "data_parallel_size": 2, "accumulation": 2}),
        ({"pipeline_parallel_size": 2, "data_parallel_size": 2, "accumulation": 2}, {"accumulation": 4}),
    ],
)
def test_stages_and_replicas_may_change(
    before: dict[str, int], after: dict[str, int], whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    killed_at(output, 0, 7, **before)
    rename_model(output)
    go_on(output, **after)
    assert apart(weights(output), weights(whole)) < 2e-5  # over 12 steps of AdamW
    for one, other in zip(rows(output), rows(whole), strict=True):
        assert one["items"] == other["items"]
        assert one["lr"] == other["lr"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("after", [{"shard_optimizer": True}, {"data_parallel_size": 1, "accumulation": 4}])
def test_the_optimizer_is_shared_out_over_replicas(after: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Its state goes on where it is shared out again, and where one rank has all of it."""
    output, ranks = tmp_path / "run", {"data_parallel_size": 2, "accumulation": 2}
    killed_at(output, 1, 7, shard_optimizer=True, pipeline_parallel_size=2, **ranks)
    files = {file.name: file for file in find(output)[0].folder.glob("*.pt")}
    assert sorted(files) == ["stage-0-replica-1.pt", "stage-0.pt", "stage-1-replica-1.pt", "stage-1.pt"]
    states = [set(torch.load(files[name])["optimizer"]) for name in sorted(files)]
    assert all(states)
    assert not states[0] & states[1]
    assert not states[2] & states[3]
    rename_model(output)
    go_on(output, **{**ranks, **after})
    assert apart(weights(output), weights(whole)) < 2e-5
    assert [row["items"] for row in rows(output)] == [row["items"] for row in rows(whole)]


def test_a_shared_out_optimizer_makes_the_same_bits(tmp_path: Path) -> None:
    given: dict[str, Any] = {"data_parallel_size": 2, "accumulation": 2, **COMMON, "steps": 4}
    run(tmp_path / "each", **given)
    run(tmp_path / "shared", shard_optimizer=True, **given)
    assert same(weights(tmp_path / "each"), weights(tmp_path / "shared"))
    assert rows(tmp_path / "each") == rows(tmp_path / "shared")


def test_rates_follow_the_formula(whole: Path) -> None:
    settings = spec(whole, **COMMON).settings
    assert [row["lr"] for row in rows(whole)] == [rate(settings, step, 12) for step in range(12)]
    assert [row["step"] for row in rows(whole)] == list(range(1, 13))


def test_rates_follow_the_formula_over_ranks_and_a_resume(tmp_path: Path) -> None:
    given: dict[str, Any] = {"steps": 20, "lr_schedule": "cosine", "warmup_steps": 4, "accumulation": 4}
    ranks = {"pipeline_parallel_size": 2, "data_parallel_size": 2}
    with pytest.raises(RankError, match="killed by signal 9"):
        run(tmp_path / "run", model="toy kill:3:9", save_every=7, **given, **ranks)
    rename_model(tmp_path / "run")
    run(tmp_path / "run", save_every=7, resume=True, **given, **ranks)
    found = [row["lr"] for row in rows(tmp_path / "run")]
    expected = [1e-2 * k / 4 if k < 4 else 1e-2 * (1 + math.cos(math.pi * (k - 4) / 16)) / 2 for k in range(20)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_each_text_is_seen_as_often_as_asked(whole: Path) -> None:
    """An epoch has 8 batches, as texts of two lengths do not share one: two steps."""
    seen = [item for row in rows(whole) for item in row["items"]]
    epoch = seen[:15]
    assert sorted(epoch) == sorted(f"text-{number}" for number in range(5) for _ in range(3))


def test_a_finished_run_can_be_prolonged(tmp_path: Path) -> None:
    output = tmp_path / "run"
    short = {**COMMON, "lr_schedule": "constant", "warmup_steps": 0}
    run(output, accumulation=4, **{**short, "steps": 3})
    run(output, accumulation=4, resume=True, **{**short, "steps": 5})
    run(tmp_path / "other", accumulation=4, **{**short, "steps": 5})
    assert same(weights(output), weights(tmp_path / "other"))
    assert rows(output) == rows(tmp_path / "other")
    with pytest.raises(InputError, match="has done 5 steps, of 4"):
        run(output, accumulation=4, resume=True, **{**short, "steps": 4})
    with pytest.raises(InputError, match="use accumulation=2"):
        run(output, accumulation=4, data_parallel_size=2, resume=True, **{**short, "steps": 6})
    with pytest.raises(InputError, match=r"--resume: texts was .* and is"):
        run(output, accumulation=4, resume=True, **{**short, "data": "toy:7", "steps": 6})
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 5]


def test_an_average_goes_that_is_of_fewer_steps_than_the_result(tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / "ema").mkdir(parents=True)
    run(output, steps=1)
    assert (output / "ema").exists()  # it is not of this run
    run(output, steps=2, resume=True, ema_decay=0.9)
    assert weights(output / "ema")
    run(output, steps=3, resume=True)
    assert not (output / "ema").exists()
    assert rows(output)[-1]["step"] == 3


def test_resume_without_a_checkpoint_begins_at_the_beginning(tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 1}\n')
    run(output, resume=True, steps=2)
    assert [row["step"] for row in rows(output)] == [1, 2]
