"""Steps of a run: stages, replicas and two experts as one rank; looking on changes nothing; epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardit.core.comm.mesh import init_mesh
from shardit.core.runtime.randomness import seed_all
from shardit.training.run.steps.trained import step_seed
from tests.training.run import toy
from tests.training.run.runs import apart, rows, run, same, spec, weights

CLOSE = 1e-5


pytestmark = pytest.mark.usefixtures("one_fork_server")


EXPERTS: dict[str, Any] = {"model": "toy experts", "steps": 6, "batch_size": 2, "data": "toy:5", "optimizer": "sgd"}


def by_hand(output: Path, **given: Any) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """The same run without anything of shardit's loop: weights, losses, norms."""
    chosen = spec(output, **given)
    settings = chosen.settings
    made = toy.Toy(settings, init_mesh(chosen.config))
    parameters = [one for model in made.models.values() for one in model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    losses, norms = [], []
    for step in range(settings.steps or 0):
        seed_all(step_seed(settings.seed, step))
        batches = made.micro_batches(step, 0, 1)
        total = sum(one.weight for one in batches)
        losses.append(0.0)
        for one in batches:
            value = made.loss(made.models[one.model], one.data) * (one.weight / total)
            value.backward()
            losses[-1] += float(value)
        norms.append(float(nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
    named = {
        f"{name}/{key}": one.detach().clone()
        for name, model in made.models.items()
        for key, one in model.named_parameters()
    }
    return named, losses, norms


@pytest.mark.parametrize(
    "given",
    [
        {"accumulation": 4},
        {"accumulation": 4, "pipeline_parallel_size": 2},
        {"accumulation": 1, "data_parallel_size": 4},
        {"accumulation": 2, "data_parallel_size": 2, "pipeline_parallel_size": 2},
    ],
)
def test_two_experts_share_the_mean_over_all_micro_batches(given: dict[str, int], tmp_path: Path) -> None:
    """With one micro-batch of four, an expert gets a quarter of its gradient; with none it stays as it is."""
    without = {**EXPERTS, "model": "toy experts still"}
    expected, losses, norms = by_hand(tmp_path / "x", accumulation=4, **without)
    run(tmp_path / "run", **without, **given)
    found = rows(tmp_path / "run")
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=CLOSE)
    assert [row["grad_norm"] for row in found] == pytest.approx(norms, rel=CLOSE)
    assert apart(weights(tmp_path / "run"), expected) < CLOSE
    both = [len(row["losses"]) for row in found]
    assert 1 in both
    assert 2 in both


def test_dropout_is_that_of_one_rank_for_any_number_of_ranks(tmp_path: Path) -> None:
    run(tmp_path / "one", accumulation=4, **EXPERTS)
    run(tmp_path / "still", accumulation=4, **{**EXPERTS, "model": "toy experts still"})
    run(tmp_path / "four", accumulation=1, data_parallel_size=4, **EXPERTS)
    assert apart(weights(tmp_path / "one"), weights(tmp_path / "four")) < CLOSE
    assert apart(weights(tmp_path / "one"), weights(tmp_path / "still")) > 1e-4


def test_looking_changes_nothing(tmp_path: Path) -> None:
    given: dict[str, Any] = {"steps": 5, "accumulation": 2, "pipeline_parallel_size": 2, "ema_decay": 0.9}
    looks = {
        "sample_every": 2,
        "sample_prompts": ("a",),
        "validate_every": 2,
        "validation_data": "toy:3",
        "save_every": 2,
    }
    blind, seeing, again = tmp_path / "blind", tmp_path / "seeing", tmp_path / "again"
    run(blind, **{**given, "ema_decay": None})
    run(seeing, **given, **looks)
    assert same(weights(blind), weights(seeing))
    plain = [{key: value for key, value in row.items() if key != "held_out_loss"} for row in rows(seeing)]
    assert plain == rows(blind)
    losses = [row.get("held_out_loss") for row in rows(seeing)]
    assert [one is not None for one in losses] == [False, True, False, True, False]
    assert losses[1] != losses[3]
    assert (seeing / "samples" / "step-00000004" / "decoder.txt").exists()
    # Two validations of the same weights agree: training with a rate of nearly nothing changes none.
    run(again, **{**given, "ema_decay": None, "learning_rate": 1e-30, "weight_decay": 0.0}, **looks)
    values = [row["held_out_loss"] for row in rows(again) if "held_out_loss" in row]
    assert len(values) == 2
    assert values[0] == values[1]


def test_held_out_loss_of_replicas_is_that_of_one_rank(tmp_path: Path) -> None:
    looks = {"validate_every": 1, "validation_data": "toy:3", "steps": 1, "batch_size": 2}
    run(tmp_path / "one", accumulation=2, **looks)
    run(tmp_path / "two", data_parallel_size=2, **looks)
    one, two = (rows(tmp_path / name)[0]["held_out_loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-6)


def test_five_texts_two_replicas_batch_two_end_together(tmp_path: Path) -> None:
    """An epoch has 3 batches of 4 a step: two epochs are two steps, the second of which begins the third epoch."""
    run(tmp_path / "run", epochs=2, batch_size=2, data="toy:5", data_parallel_size=2, accumulation=2)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    items = [item for row in rows(tmp_path / "run") for item in row["items"]]
    for epoch in (items[:5], items[5:10]):
        assert sorted(epoch) == [f"text-{number}" for number in range(5)]


def test_replicas_draw_differently_and_stages_alike(tmp_path: Path) -> None:
    for name, given in (
        ("four", {"pipeline_parallel_size": 2, "data_parallel_size": 2, "accumulation": 2}),
        ("one", {"accumulation": 4}),
    ):
        run(tmp_path / name, steps=1, model=f"toy draws:{tmp_path / name}-drawn", **given)
    four = [set((tmp_path / f"four-drawn-{rank}").read_text().split()) for rank in range(4)]
    alone = set((tmp_path / "one-drawn-0").read_text().split())
    assert four[0] == four[1]
    assert four[2] == four[3]
    assert not four[0] & four[2]
    assert four[0] | four[2] == alone
    assert len(alone) == 4


def test_samples_that_cannot_be_written_end_no_run(tmp_path: Path) -> None:
    looks: dict[str, Any] = {"sample_every": 1, "sample_prompts": ("a",), "data_parallel_size": 2, "steps": 2}
    assert not run(tmp_path / "run", model="toy full:disk", **looks)
    assert len(rows(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"schedule": "gpipe", "layer_partition": (3, 1)},
        {"schedule": "interleaved", "pipeline_chunks": 2},
        {"schedule": "zbv"},
    ],
)
def test_schedules_and_partitions_do_as_one_rank(given: dict[str, Any], tmp_path: Path) -> None:
    shared: dict[str, Any] = {"steps": 3, "accumulation": 4, "optimizer": "sgd", "model": "toy still"}
    run(tmp_path / "one", **shared)
    run(tmp_path / "two", pipeline_parallel_size=2, **shared, **given)
    assert apart(weights(tmp_path / "one"), weights(tmp_path / "two")) < CLOSE


def test_a_stage_may_have_nothing_to_train(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"accumulation": 2, "ema_decay": 0.9, "model": "toy still last"}
    run(tmp_path / "one", steps=4, **shared)
    run(tmp_path / "two", steps=2, pipeline_parallel_size=2, **shared)
    run(tmp_path / "two", steps=4, pipeline_parallel_size=2, resume=True, **shared)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert apart(one, two) < CLOSE
    first = toy.made(still=True).state_dict()
    changed = {name for name in first if not torch.equal(first[name], two[f"decoder/{name}"])}
    assert changed
    assert all("layers.3." in name for name in changed)


def test_no_clipping_and_no_average_are_possible(tmp_path: Path) -> None:
    run(tmp_path / "free", steps=2, max_grad_norm=0.0, optimizer="sgd")
    run(tmp_path / "tight", steps=2, max_grad_norm=1e-3, optimizer="sgd")
    assert rows(tmp_path / "free")[0]["grad_norm"] == rows(tmp_path / "tight")[0]["grad_norm"] > 1e-3
    assert apart(weights(tmp_path / "free"), weights(tmp_path / "tight")) > 1e-4
    assert not (tmp_path / "free" / "ema").exists()
