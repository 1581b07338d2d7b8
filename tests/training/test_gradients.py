"""Gradients and losses of stages against one rank that accumulates over the same micro-batches."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from shardit import training
from shardit.core.training.schedules import DEFERRING
from shardit.training.limits import SCHEDULES
from tests.language import families
from tests.support import survey_models
from tests.support.ranks import run_ranks
from tests.training.cases import Odd, cases, odd
from tests.training.models import IMAGES, TEXTS, Task, accumulate, task, worst
from tests.training.runs import cases_right, join, one_step

CLOSE = 2e-6


def all_of(rank: int, size: int, method: str, names: tuple[str, ...], runs: list[dict[str, Any]]) -> dict[str, Any]:
    join(rank, size, method)
    made = {}
    for name in names:
        for options in runs:
            chosen = {"pipeline_parallel_size": size, **options}
            count = chosen.pop("count", 4)
            made[f"{name} {options}"] = one_step(task(name), count, chosen)
    return made


def check(of_ranks: list[dict[str, Any]], expected: int) -> None:
    """Every parameter of the model is right on the ranks that have it, and every one has a rank."""
    assert len(of_ranks[0]) == expected
    for name in of_ranks[0]:
        for rank, found in enumerate(of_ranks):
            got = found[name]
            assert not got["only"], (name, rank, got["only"][:3])
            assert max(got["worst"], got["loss"]) < CLOSE, (name, rank, got)
            assert got["held"] < got["of"], (name, rank, "no stage may have the whole model")
        assert sum(found[name]["compared"] for found in of_ranks) > 0


@pytest.mark.parametrize("names", [IMAGES, TEXTS])
def test_two_stages(names: tuple[str, ...]) -> None:
    runs: list[dict[str, Any]] = [
        {},
        {"schedule": "interleaved"},
        {"schedule": "gpipe", "count": 3},
        {"schedule": "zbv"},
        {"schedule": "interleaved-zb"},
    ]
    check(run_ranks(2, all_of, names, runs, timeout=200), len(names) * len(runs))


def test_four_and_uneven_stages() -> None:
    names = ("WanTransformer3DModel", "SD3Transformer2DModel", "llama")
    check(run_ranks(4, all_of, names, [{}, {"count": 2}], timeout=200), 6)
    uneven: list[dict[str, Any]] = [{"layer_partition": (1, 4)}, {"layer_partition": (3, 2), "count": 1}]
    check(run_ranks(2, all_of, names[:1], uneven, timeout=200), 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_number_of_micro_batches(schedule: str) -> None:
    runs = [{"schedule": schedule, "count": count} for count in (1, 2, 3, 5, 7, 8)]
    check(run_ranks(2, all_of, ("llama",), runs, timeout=200), len(runs))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_what_training_meets(size: int) -> None:
    names = list(cases())
    for_ranks = run_ranks(size, cases_right, names, timeout=240)
    check(for_ranks, len(names))
    late = [found["lora in the last block"]["compared"] for found in for_ranks]
    assert late == [0] * (size - 1) + [4]


@pytest.mark.parametrize("schedule", ["zbv", "interleaved-zb"])
def test_what_training_meets_with_deferred_weight_gradients(schedule: str) -> None:
    """Among it weights that are used twice."""
    names = [name for name in cases() if name != "two calls" or schedule != "zbv"]  # zbv would turn round twice
    check(run_ranks(2, functools.partial(cases_right, count=4, schedule=schedule), names, timeout=240), len(names))


def deep(name: str) -> Task:
    """A task with eight blocks, so that each of four stages may have two chunks."""
    if name in TEXTS:
        return replace(task(name), build=lambda: families.make(name, num_hidden_layers=8))
    if name in IMAGES:
        entry = survey_models.entry(name)
        return replace(task(name), build=replace(entry, config={**entry.config, "num_layers": 8}).build)

    def build() -> torch.nn.Module:
        torch.manual_seed(3)
        return Odd(name, depth=8)

    return replace(odd(name), build=build)


def of_four_stages(rank: int, size: int, method: str, schedule: str, counts: tuple[int, ...]) -> dict[str, Any]:
    join(rank, size, method)
    options = {"pipeline_parallel_size": size, "schedule": schedule}
    names = (*IMAGES, "llama", "mixtral", "plain", "made between", "tied blocks", "tied ends", "each block twice")
    return {f"{name} {count}": one_step(deep(name), count, options) for name in names for count in counts}


@pytest.mark.full
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_on_four_stages(schedule: str) -> None:
    found = run_ranks(4, of_four_stages, schedule, (4, 7), timeout=240)
    check(found, 22)


def test_the_comparison_sees_a_wrong_gradient() -> None:
    """The negative control: one rank with one other micro-batch."""
    chosen = task("WanTransformer3DModel")
    plain, other = chosen.build(), chosen.build()
    accumulate(plain, chosen.loss, [chosen.batch(number, False) for number in (0, 1)])
    accumulate(other, chosen.loss, [chosen.batch(number, False) for number in (0, 2)])
    assert worst(other.named_parameters(), plain)[0] > 1e-2


def several_steps(rank: int, size: int, method: str) -> list[float]:
    """Steps of other sizes, gradients that add up over steps, weights, and micro-batches of several sizes in one."""
    join(rank, size, method)
    chosen = task("WanTransformer3DModel")
    plain, model = chosen.build(), chosen.build()
    staged = training.stages(model, chosen.loss, pipeline_parallel_size=size, timeout_s=30)
    found = []
    for sizes, weights in (
        ((False, False), None),
        ((True, True, True), [1.0, 3.0, 0.5]),
        ((False, True, False), [3.0, 13.0, 0.0]),
        ((False,), None),
    ):
        batches = [chosen.batch(number, big) for number, big in enumerate(sizes)]
        expected = accumulate(plain, chosen.loss, batches, weights)
        found.append(abs(float(staged.step(batches, weights)) - expected) / abs(expected))
        largest, compared, only = worst(staged.named_parameters(), plain)
        assert compared
        assert not only
        found.append(largest)
        with torch.no_grad():  # a look at the model between steps, by all stages together
            got, want = (m(**chosen.batch(7, True)).sample for m in (model, plain))
        assert torch.equal(got, want)
    return found


def test_sizes_change_weights_count_and_gradients_add_up() -> None:
    for found in run_ranks(2, several_steps, timeout=120):
        assert max(found) < CLOSE, found


def padded(rank: int, size: int, method: str) -> tuple[list[float], int, int]:
    """Texts of other lengths in batches of one size, as a tokenizer returns them: the model looks at each mask."""
    join(rank, size, method)
    chosen = task("llama")

    def loss(model: Any, batch: Any) -> torch.Tensor:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return model(**batch, labels=labels, use_cache=False).loss

    def batch(number: int) -> BatchEncoding:
        mask = torch.ones(2, 11, dtype=torch.int64)
        mask[1, 11 - number % 5 :] = 0
        return BatchEncoding({"input_ids": chosen.batch(number, False), "attention_mask": mask})

    plain, model = chosen.build(), chosen.build()
    staged = training.stages(model, loss, pipeline_parallel_size=size, check_gradients=False, timeout_s=30)
    found = []
    for step in range(2):
        batches = [batch(step * 3 + number) for number in range(3)]
        expected = accumulate(plain, loss, batches)
        found.append(abs(float(staged.step(batches)) - expected) / expected)
        found.append(worst(staged.named_parameters(), plain)[0])
    known = staged.cut_loss.known.schedules.values()
    runs = sum(count for block, count in staged.cut_loss.cut.ran.items() if block in (0, 2))
    return found, len({one.plan.digest() for one in known}), runs


def test_masks_with_other_values_are_watched_once() -> None:
    for found, courses, runs in run_ranks(2, padded, timeout=120):
        assert max(found) < CLOSE, found
        assert courses == 2  # without padding the model makes no mask
        assert runs == 6 + courses + 1  # once for each micro-batch, again where it is watched, and in one check


def other_text(rank: int, size: int, method: str) -> list[float]:
    """The text alone has another length, which changes nothing that crosses a cut."""
    join(rank, size, method)
    chosen = task("WanTransformer3DModel")
    plain, model = chosen.build(), chosen.build()
    staged = training.stages(model, chosen.loss, pipeline_parallel_size=size, timeout_s=30)
    short, long = chosen.batch(0, False), chosen.batch(1, True)
    for batches in ([short], [{**short, "encoder_hidden_states": long["encoder_hidden_states"]}, short]):
        accumulate(plain, chosen.loss, batches)
        staged.step(batches)
    return [worst(staged.named_parameters(), plain)[0]]


def test_text_of_another_length() -> None:
    for found in run_ranks(2, other_text, timeout=120):
        assert max(found) < CLOSE, found


def empty(rank: int, size: int, method: str) -> tuple[float, list[float]]:
    """A micro-batch without tokens, whose loss is NaN, has weight 0; then a step of nothing but such."""
    join(rank, size, method)
    chosen = task("llama")

    def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        return chosen.loss(model, batch.abs()) if int(batch[0, 0]) >= 0 else chosen.loss(model, batch.abs()) * torch.nan

    staged = training.stages(chosen.build(), loss, pipeline_parallel_size=size, timeout_s=30)
    good, bad = chosen.batch(0, False) + 1, -chosen.batch(1, False) - 1
    value = float(staged.step([good, bad], weights=[5, 0]))
    first = [float(p.grad.norm()) for p in staged.parameters() if p.grad is not None]
    none = float(staged.step([bad], weights=[0]))
    second = [float(p.grad.norm()) for p in staged.parameters() if p.grad is not None]
    return value, [none, *(a - b for a, b in zip(first, second, strict=True))]


def test_micro_batches_of_weight_zero_give_no_nan() -> None:
    for value, zeros in run_ranks(2, empty, timeout=120):
        assert value == value
        assert set(zeros) == {0.0}


def curve(rank: int, size: int, method: str, steps: int) -> tuple[list[float], list[float]]:
    """The losses of optimizer steps, over stages and on one rank."""
    join(rank, size, method)
    chosen = task("WanTransformer3DModel")
    plain, model = chosen.build(), chosen.build()
    staged = training.stages(model, chosen.loss, pipeline_parallel_size=size, timeout_s=30)
    mine = torch.optim.AdamW(staged.parameters(), lr=1e-3)
    other = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    got, expected = [], []
    for _ in range(steps):
        batches = [chosen.batch(number, False) for number in range(4)]
        expected.append(accumulate(plain, chosen.loss, batches))
        got.append(float(staged.step(batches)))
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        staged.clip_grad_norm_(1.0)
        for optimizer in (mine, other):
            optimizer.step()
            optimizer.zero_grad()
    return got, expected


def test_twenty_steps_follow_the_losses_of_one_rank() -> None:
    for got, expected in run_ranks(2, functools.partial(curve, steps=20), timeout=200):
        assert got == pytest.approx(expected, rel=2e-5)
        assert expected[-1] < 0.9 * expected[0]


def hooked(rank: int, size: int, method: str, schedule: str) -> tuple[int, float]:
    """A hook halves the gradient of each linear; return how often it ran here, and the largest difference."""
    join(rank, size, method)
    chosen, ran = odd("plain"), []

    def halved(gradient: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return gradient / 2

    plain, model = chosen.build(), chosen.build()
    for one in (plain, model):
        for block in one.blocks:  # pyright: ignore
            block.linear.weight.register_hook(halved)
    batches = [chosen.batch(number, False) for number in range(4)]
    accumulate(plain, chosen.loss, batches)
    ran.clear()
    staged = training.stages(model, chosen.loss, schedule=schedule, pipeline_parallel_size=size, timeout_s=30)
    staged.step(batches)
    return len(ran), worst(staged.named_parameters(), plain)[0]


@pytest.mark.parametrize("schedule", DEFERRING)
def test_hooks_of_weights_run_where_their_gradients_are_deferred(schedule: str) -> None:
    for ran, largest in run_ranks(2, hooked, schedule, timeout=60):
        assert ran == 2 * 4
        assert largest < CLOSE
