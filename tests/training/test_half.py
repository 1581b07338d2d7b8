"""bfloat16 and autocast: nearer to one rank than that is to float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from shardit import training
from tests.language import families
from tests.support.ranks import run_ranks
from tests.training.cases import wan
from tests.training.models import Task, accumulate, task, text_loss, worst
from tests.training.runs import join


def _autocast() -> Task:
    base = wan()

    def loss(model: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return base.loss(model, batch)

    return replace(base, loss=loss)


def _half() -> Task:
    base = wan()

    def batch(number: int, big: bool) -> Any:
        found = base.batch(number, big)
        return {name: t if name == "timestep" else t.to(torch.bfloat16) for name, t in found.items()}

    return replace(base, build=lambda: base.build().to(torch.bfloat16), batch=batch)


def distances(rank: int, size: int, method: str, axis: str = "pipeline_parallel_size") -> dict[str, tuple[float, ...]]:
    """For each kind: the distances of ranks to one rank, of the last block alone, and of one rank to float32."""
    join(rank, size, method)
    found = {}
    for name, chosen in (("autocast", _autocast()), ("bfloat16", _half())):
        batches = [chosen.batch(number, False) for number in range(4)]
        plain, whole, model = chosen.build(), wan().build(), chosen.build()
        expected = accumulate(plain, chosen.loss, batches)
        accumulate(whole, wan().loss, [wan().batch(number, False) for number in range(4)])
        staged = training.stages(model, chosen.loss, timeout_s=30, **{axis: size})
        value = float(staged.step(batches))
        assert abs(value - expected) < 1e-2 * expected
        largest, compared, only = worst(staged.named_parameters(), plain, staged.slices)
        assert compared
        assert not only
        last = [(key, p) for key, p in staged.named_parameters() if key.startswith("blocks.4.")]
        found[name] = largest, worst(last, plain, staged.slices)[0], worst(plain.named_parameters(), whole)[0]
    return found


def test_half_precision_is_within_the_noise_of_one_rank() -> None:
    for found in run_ranks(2, distances, timeout=100):
        for name, (distance, last, noise) in found.items():
            print(name, distance, last, noise)
            assert distance < noise < 0.1, name
            assert last < 1e-6, name  # its gradients are sums over micro-batches alone, in the same order


def test_half_precision_on_slices() -> None:
    """The partial sums of slices are rounded, too."""
    for found in run_ranks(2, distances, "tensor_parallel_size", timeout=100):
        for name, (distance, _, noise) in found.items():
            assert distance < 2 * noise < 0.1, (name, distance, noise)


def outside(rank: int, size: int, method: str) -> float:
    """Autocast around the steps: weights that the watched call has cast must not be used again."""
    join(rank, size, method)
    chosen = wan()
    plain, model = chosen.build(), chosen.build()
    staged = training.stages(model, chosen.loss, pipeline_parallel_size=size, timeout_s=30)
    batches = [chosen.batch(number, False) for number in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        staged.step(batches)
        accumulate(plain, chosen.loss, batches)
    largest, compared, only = worst(staged.named_parameters(), plain)
    assert compared
    assert not only
    return largest


def test_autocast_around_the_steps() -> None:
    assert max(run_ranks(2, outside, timeout=100)) < 3e-2


def texts(rank: int, size: int, method: str) -> dict[str, float]:
    """Language models with dropout, under autocast with weights in float32, with checkpointing."""
    join(rank, size, method)
    found = {}
    for name, dropout in (("olmo2", "attention_dropout"), ("gpt2", "resid_pdrop")):

        def build(name: str = name, dropout: str = dropout) -> Any:
            model = families.make(name, **{dropout: 0.2}).train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return model

        def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(int(batch.sum()))
            with torch.autocast("cpu", torch.bfloat16):
                return text_loss(model, batch)

        plain, model = build(), build()
        batches = [task(name).batch(number, False) for number in range(3)]
        expected = accumulate(plain, loss, batches)
        staged = training.stages(model, loss, pipeline_parallel_size=size, timeout_s=30)
        value = float(staged.step(batches))
        largest, compared, only = worst(staged.named_parameters(), plain)
        assert compared
        assert not only
        found[name] = max(largest, abs(value / expected - 1))
    return found


def test_what_crosses_a_cut_is_cast_for_each_reader_as_on_one_rank() -> None:
    """Autocast casts leaves of autograd once, and what crosses a cut would be such a leaf: its gradients from several
    linears would be summed in half precision."""
    for found in run_ranks(2, texts, timeout=100):
        assert max(found.values()) < 2e-6, found
