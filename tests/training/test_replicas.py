"""Replicas: gradients averaged once per step, over unequal shares, with draws of their own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardit import InputError, training
from shardit.core.training.gradients import sums
from tests.support.ranks import run_ranks
from tests.training.models import accumulate, task, worst
from tests.training.runs import join

CLOSE = 2e-6


def replicated(rank: int, size: int, method: str, stages: int, folder: str) -> list[float]:
    """Steps over replicas with unequal shares and weights, compared with one rank that has all micro-batches."""
    join(rank, size, method)
    chosen = task("llama")
    plain, model = chosen.build(), chosen.build()
    copies = size // stages
    staged = training.stages(model, chosen.loss, data_parallel_size=copies, pipeline_parallel_size=stages, timeout_s=30)
    mine, found = rank // stages, []
    for counts, weights in (
        ([2, 2], None),
        ([1, 3], [3.0, 13.0, 4.0, 1.0]),
        ([3, 1], [1.0, 0.0, 2.0, 0.0]),
        ([1, 3], [0.0, 1.0, 2.0, 0.0]),
    ):
        batches = [chosen.batch(number, number == 1) for number in range(4)]
        expected = accumulate(plain, chosen.loss, batches, weights)
        start = sum(counts[:mine])
        part = slice(start, start + counts[mine])
        value = staged.step(batches[part], weights and weights[part])
        largest, compared, only = worst(staged.named_parameters(), plain)
        assert compared
        assert not only
        found += [abs(float(value) - expected) / expected, largest]
        plain.zero_grad()
        model.zero_grad()
    staged.save_pretrained(folder)
    return found


@pytest.mark.parametrize("stages", [1, 2])
def test_replicas_give_the_gradients_of_one_rank(stages: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for found in run_ranks(2 * stages, functools.partial(replicated, stages=stages, folder=str(folder)), timeout=120):
        assert max(found) < CLOSE, found
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in task("llama").build().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def draws(rank: int, size: int, method: str, stages: int, counts: int) -> list[float]:
    """The random numbers that each micro-batch of this rank draws in its loss."""
    if size > 1:
        join(rank, size, method)
    seen: list[float] = []

    def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        seen.append(float(torch.rand(())))
        return chosen.loss(model, batch)

    chosen = task("llama")
    torch.manual_seed(7)
    staged = training.stages(
        chosen.build(), loss, data_parallel_size=size // stages, pipeline_parallel_size=stages, timeout_s=30
    )
    staged.step([chosen.batch(number, False) for number in range(counts)])
    after = float(torch.rand(()))
    return [*dict.fromkeys(seen), after]


def test_replicas_draw_differently_and_stages_alike() -> None:
    of_ranks = run_ranks(4, functools.partial(draws, stages=2, counts=2), timeout=120)
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[2] == of_ranks[3]
    alone = draws(0, 1, "", 1, 4)
    assert of_ranks[0][:2] + of_ranks[2][:2] == alone[:4]
    assert len(set(alone[:4])) == 4
    assert of_ranks[0][-1] == alone[-1]  # the generators go on as if one number had been drawn


def mistakes(rank: int, size: int, method: str) -> list[str]:
    """What is refused, in words."""
    join(rank, size, method)
    chosen = task("llama")
    found = []

    def refused(act: Any) -> None:
        with pytest.raises(InputError) as error:
            act()
        found.append(str(error.value))

    def two(**options: Any) -> training.Stages:
        return training.stages(chosen.build(), chosen.loss, pipeline_parallel_size=size, timeout_s=30, **options)

    refused(lambda: training.stages(chosen.build(), chosen.loss, ulysses_degree=2))
    refused(lambda: two(transport="host"))
    refused(lambda: two(schedule="zigzag"))
    refused(lambda: two(pipeline_chunks=2))
    refused(lambda: two(schedule="interleaved", layer_partition=(1, 3)))
    refused(lambda: training.stages(task("llama").build(), chosen.loss, pipeline_parallel_size=9))
    staged = two()
    refused(lambda: staged.step([]))
    refused(lambda: staged.step([chosen.batch(0, False)], weights=[1, 2]))
    refused(lambda: staged.step([chosen.batch(0, False)], weights=[-1]))
    refused(lambda: staged.step([chosen.batch(rank, False)]))
    staged.model.train(rank == 0)
    refused(lambda: staged.step([chosen.batch(0, False)]))
    staged.model.eval()
    staged.step([chosen.batch(0, False)])
    refused(lambda: staged.model(chosen.batch(0, False)))
    refused(lambda: training.stages(staged.model, chosen.loss, pipeline_parallel_size=size))
    torch.manual_seed(rank)
    with torch.no_grad():
        other = chosen.build()
        other.model.norm.weight += rank  # pyright: ignore
    refused(lambda: training.stages(other, chosen.loss, pipeline_parallel_size=size))
    refused(
        lambda: training.stages(chosen.build(), lambda m, b: m(b).logits, pipeline_parallel_size=2).step(
            [chosen.batch(0, False)]
        )
    )
    return found


def test_mistakes_are_named_in_one_line() -> None:
    parts = (
        "ulysses_degree=2: training takes only 1",
        "transport='host'",
        "schedule='zigzag' must be one of gpipe",
        "pipeline_chunks=2",
        "layer_partition has 2 entries",
        "the process group has 2 ranks",
        "micro_batches is empty",
        "weights has 2 entries",
        "weights has -1",
        "different micro-batches",
        "train() or eval()",
        "with gradients outside of step()",
        "parallel already",
        "model.norm.weight",
        "one floating-point number, not a tensor of shape",
    )
    for found in run_ranks(2, mistakes, timeout=120):
        assert len(found) == len(parts)
        for text, part in zip(found, parts, strict=True):
            assert part in text
            assert "\n" not in text


def shared_out(rank: int, size: int, method: str, stages: int) -> list[float]:
    """Three samples as 2 + 1 on replicas, or as micro-batches of one, compared with all three in one batch."""
    join(rank, size, method)
    chosen, replicas = task("WanTransformer3DModel"), size // stages
    samples = [chosen.batch(number, False) for number in range(3)]

    def batch(*numbers: int) -> Any:
        return {name: torch.cat([samples[number][name] for number in numbers]) for name in samples[0]}

    def loss(model: Any, given: Any) -> torch.Tensor:
        return (model(**given).sample ** 2).mean()

    plain, model = chosen.build(), chosen.build()
    expected = accumulate(plain, loss, [batch(0, 1, 2)])
    staged = training.stages(model, loss, data_parallel_size=replicas, pipeline_parallel_size=stages, timeout_s=30)
    parts = [batch(0, 1), batch(2)]
    mine = slice(None) if replicas == 1 else slice(rank // stages, rank // stages + 1)
    value = float(staged.step(parts[mine], [2.0, 1.0][mine]))
    largest, compared, only = worst(staged.named_parameters(), plain)
    assert compared
    assert not only
    return [abs(value / expected - 1), largest]


@pytest.mark.parametrize(("size", "stages"), [(2, 2), (2, 1), (4, 2)])
def test_short_batches_weigh_by_their_samples(size: int, stages: int) -> None:
    for found in run_ranks(size, functools.partial(shared_out, stages=stages), timeout=100):
        assert max(found) < CLOSE, found


def early(rank: int, size: int, method: str, kind: str) -> tuple[list[float], list[int], int]:
    """Steps whose sums begin during the last backward; the third one adds to gradients more often than was expected."""
    sums.BUCKET_BYTES = 1 << 12
    join(rank, size, method)
    chosen = task("llama")
    plain, model = chosen.build(), chosen.build()
    twice = False

    def loss(model: Any, batch: Any) -> torch.Tensor:
        value = chosen.loss(model, batch)
        if twice:
            value.backward(retain_graph=True)  # adds to all gradients before the last backward
        return value

    options = {"data_parallel_size": 2, "pipeline_parallel_size": size // 2, "schedule": kind, "timeout_s": 30}
    staged = training.stages(model, loss, **options)
    errors, begun = [], []
    for step in range(4):
        twice = step == 2 and size == 2
        batches = [chosen.batch(number, False) for number in range(4)]
        expected = accumulate(plain, loss, batches)
        value = staged.step(batches[rank // (size // 2) :: 2])
        largest, _, only = worst(staged.named_parameters(), plain)
        assert not only
        errors += [abs(float(value) - expected) / expected, largest]
        begun.append(staged._sums.begun_early)  # type: ignore[union-attr]
        plain.zero_grad()
        model.zero_grad()
    return errors, begun, len(staged._sums._buckets)  # type: ignore[union-attr]


@pytest.mark.parametrize(("size", "kind"), [(2, "1f1b"), (4, "1f1b"), (4, "interleaved-zb")])
def test_sums_begin_during_the_backward(size: int, kind: str) -> None:
    for errors, begun, buckets in run_ranks(size, functools.partial(early, kind=kind), timeout=120):
        assert max(errors) < CLOSE, errors
        assert buckets > 2
        # The third step of two ranks is not what the second one was, nor the fourth what the third one was.
        third = buckets if size == 4 else 0
        assert begun == ([0, buckets, buckets, third] if kind == "1f1b" else [0] * 4)
