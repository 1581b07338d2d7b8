"""Tensor ranks: gradients through slices of weights are those of one rank."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shardit import UnsupportedError, training
from shardit.parallel import differentiable
from tests.language import families
from tests.support.ranks import run_ranks
from tests.training.cases import cases, wan
from tests.training.models import IMAGES, TEXTS, Task, accumulate, task
from tests.training.runs import join, one_step

CLOSE = 2e-6
"""Beyond the effect of rounding: sums over slices round differently in the forward, too."""


def check(of_ranks: list[dict[str, Any]], expected: int) -> None:
    """Every gradient on every rank is right, and no rank has the whole model."""
    assert len(of_ranks[0]) == expected
    for name in of_ranks[0]:
        for rank, found in enumerate(of_ranks):
            got = found[name]
            assert not got["only"], (name, rank, got["only"][:3])
            assert max(got["beyond"], got["loss"]) < CLOSE, (name, rank, got)
            assert got["worst"] < 2e-5, (name, rank, got)
            assert got["share"] < 0.9, (name, rank, got)
        assert sum(found[name]["compared"] for found in of_ranks) > 0


def all_of(rank: int, size: int, method: str, names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    join(rank, size, method)
    return {name: one_step(task(name), 3, options) for name in names}


@pytest.mark.parametrize("names", [IMAGES, TEXTS])
def test_two_tensor_ranks(names: tuple[str, ...]) -> None:
    check(run_ranks(2, functools.partial(all_of, tensor_parallel_size=2), names, timeout=200), len(names))


def test_more_tensor_ranks_than_key_heads() -> None:
    """Llama has two key heads: two ranks have copies of each."""
    check(run_ranks(4, functools.partial(all_of, tensor_parallel_size=4), ("llama",), timeout=200), 1)


def of_uneven(rank: int, size: int, method: str) -> dict[str, Any]:
    join(rank, size, method)
    four = replace(task("llama"), build=lambda: families.make("llama", num_key_value_heads=4))
    return {"llama": one_step(four, 3, {"tensor_parallel_size": size})}


def of_float64(rank: int, size: int, method: str) -> dict[str, Any]:
    join(rank, size, method)
    wide = replace(task("olmo2"), build=lambda: families.make("olmo2").double())
    return {"olmo2": one_step(wide, 3, {"tensor_parallel_size": size})}


def test_norms_in_float32_of_a_float64_model() -> None:
    """OLMo 2 computes norms over all heads, in float32 whatever its type."""
    check(run_ranks(2, of_float64, timeout=100), 1)


def test_slices_of_unequal_length() -> None:
    """Three ranks have two, one and one of four heads."""
    check(run_ranks(3, of_uneven, timeout=100), 1)


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("llama", {"target_modules": ["q_proj", "o_proj"], "use_dora": True}),
    "parameters": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
}
"""Adapters of language models that scale whole rows, or change a tensor that no linear has."""


def adapted(rank: int, size: int, method: str, axis: str) -> dict[str, Any]:
    """Train adapters over ranks; return the comparison with one rank, or the refusal."""
    from peft import LoraConfig, get_peft_model

    join(rank, size, method)
    found: dict[str, Any] = {}
    for kind, (name, options) in ADAPTERS.items():
        config = LoraConfig(r=4, init_lora_weights=False, **options)

        def build(name: str = name, config: LoraConfig = config) -> torch.nn.Module:
            torch.manual_seed(5)
            return get_peft_model(families.make(name), config).train()  # pyright: ignore

        try:
            found[kind] = one_step(replace(task("llama"), build=build), 3, {axis: size})
        except UnsupportedError as error:
            found[kind] = str(error)
    return found


def test_other_adapters_of_language_models_train_over_stages() -> None:
    for found in run_ranks(2, adapted, "pipeline_parallel_size", timeout=100):
        for kind in ADAPTERS:
            assert not found[kind]["only"], kind
            assert max(found[kind]["worst"], found[kind]["loss"]) < CLOSE, kind
            assert found[kind]["compared"] > 0, kind


def test_other_adapters_of_language_models_are_refused_on_tensor_ranks() -> None:
    for found in run_ranks(2, adapted, "tensor_parallel_size", timeout=100):
        for kind, place in {"DoRA": r"self_attn\.q_proj", "parameters": r"mlp\.experts"}.items():
            assert re.search(rf"{place} is cut over .* not plain LoRA: merge it .*merge_and_unload", found[kind]), kind
            assert "\n" not in found[kind]


@pytest.mark.parametrize(
    "more", [{"pipeline_parallel_size": 2}, {"data_parallel_size": 2}, {"pipeline_parallel_size": 2, "schedule": "zbv"}]
)
def test_tensor_ranks_with_stages_or_replicas(more: dict[str, Any]) -> None:
    names = ("WanTransformer3DModel", "SD3Transformer2DModel", "llama")
    check(run_ranks(4, functools.partial(all_of, tensor_parallel_size=2, **more), names, timeout=200), len(names))


def text_lora() -> Task:
    """A language model in an adapter of peft on all of its linears."""

    def build() -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2)
        return get_peft_model(families.make("llama"), config).train()  # pyright: ignore

    return replace(task("llama"), build=build, loss=seeded(task("llama").loss))


def seeded(loss: Any) -> Any:
    """A loss that draws the same in any order of micro-batches."""

    def drawn(model: Any, batch: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(int(batch.sum()))
        return loss(model, batch)

    return drawn


def only_biases() -> Task:
    """A model of which only biases behind slices learn: one rank alone adds them."""

    def build() -> torch.nn.Module:
        model = wan().build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.endswith(("to_out.0.bias", "net.2.bias"))
        return model

    return replace(wan(), build=build)


def met() -> dict[str, Task]:
    """What training meets, by name."""
    known = cases()
    names = ("checkpointing", "checkpointing of a language model", "lora", "lora, checkpointing", "teacher")
    return {
        **{name: known[name] for name in (*names, "lora in the last block", "tied embedding")},
        "lora with dropout of a language model": text_lora(),
        "biases alone": only_biases(),
    }


def all_met(rank: int, size: int, method: str, **options: Any) -> dict[str, Any]:
    join(rank, size, method)
    return {name: one_step(chosen, 3, options) for name, chosen in met().items()}


def test_what_training_meets() -> None:
    check(run_ranks(2, functools.partial(all_met, tensor_parallel_size=2), timeout=240), len(met()))


@pytest.mark.full
def test_what_training_meets_over_stages() -> None:
    options = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    check(run_ranks(4, functools.partial(all_met, **options), timeout=240), len(met()))


def without_adjoint(rank: int, size: int, method: str, name: str) -> float:
    """The negative control: one of the adjoints is left out."""
    join(rank, size, method)
    left: dict[str, Callable[..., Any]] = {
        "_Sum": lambda ctx, gradient: (None, gradient, *(None,) * ctx.learned),
        "_Join": lambda ctx, gradient: (
            None,
            gradient.split(list(ctx.lengths), ctx.dim)[ctx.ranks.index].contiguous(),
            None,
            None,
        ),
    }
    getattr(differentiable, name).backward = staticmethod(left[name])
    return one_step(wan(), 1, {"tensor_parallel_size": size})["worst"]


@pytest.mark.parametrize("name", ["_Sum", "_Join"])
def test_an_adjoint_that_is_left_out_is_seen(name: str) -> None:
    assert min(run_ranks(2, without_adjoint, name, timeout=60)) > 1e-2


def curve(rank: int, size: int, method: str, steps: int, name: str) -> tuple[list[Any], list[Any]]:
    """The losses and norms of optimizer steps, on tensor ranks and on one rank."""
    join(rank, size, method)
    chosen = task(name)
    plain, model = chosen.build(), chosen.build()
    staged = training.stages(model, chosen.loss, tensor_parallel_size=size, timeout_s=30)
    mine = torch.optim.AdamW(staged.parameters(), lr=1e-3)
    other = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    got, expected = [], []
    for _ in range(steps):
        batches = [chosen.batch(number, False) for number in range(2)]
        expected.append(accumulate(plain, chosen.loss, batches))
        got.append(float(staged.step(batches)))
        expected.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)))
        got.append(float(staged.clip_grad_norm_(1.0)))
        for optimizer in (mine, other):
            optimizer.step()
            optimizer.zero_grad()
    return got, expected


@pytest.mark.parametrize(("name", "size"), [("WanTransformer3DModel", 2), ("llama", 4)])
def test_twenty_steps_follow_the_losses_and_norms_of_one_rank(name: str, size: int) -> None:
    for got, expected in run_ranks(size, functools.partial(curve, steps=20, name=name), timeout=200):
        assert got[::2] == pytest.approx(expected[::2], rel=2e-5, abs=1e-7)
        assert got[1::2] == pytest.approx(expected[1::2], rel=2e-4)
        assert expected[-2] < 0.9 * expected[0]


def dropping(rank: int, size: int, method: str, stages: int) -> list[str]:
    """Dropout between slices, whose draws for a part are not those for the whole."""
    join(rank, size, method)
    found = []
    for chosen in (
        cases()["dropout"],
        replace(task("llama"), build=lambda: families.make("llama", attention_dropout=0.1).train()),
    ):
        staged = training.stages(
            chosen.build(), chosen.loss, tensor_parallel_size=2, pipeline_parallel_size=stages, timeout_s=20
        )
        with pytest.raises(UnsupportedError) as error:
            staged.step([chosen.batch(0, False)])
        found.append(str(error.value))
    return found


@pytest.mark.parametrize("stages", [1, 2])
def test_dropout_on_slices_is_refused(stages: int) -> None:
    for first, second in run_ranks(2 * stages, dropping, stages, timeout=120):
        assert "blocks.0.ffn" in first or "blocks.0.attn" in first, first
        assert "layers.0.self_attn" in second
        assert "attention_dropout" in second
        assert "\n" not in first + second


def refused(rank: int, size: int, method: str) -> list[str]:
    """What would be wrong in silence: a loss that reads slices, hooks on gradients of slices."""
    join(rank, size, method)
    chosen = task("llama")

    def of_weight(model: Any, batch: torch.Tensor) -> torch.Tensor:
        return chosen.loss(model, batch) + model.lm_head.weight.square().sum()

    def by_hand(model: Any, batch: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
        return (hidden @ model.lm_head.weight.T).mean()

    found = []
    for loss in (of_weight, by_hand):
        staged = training.stages(chosen.build(), loss, tensor_parallel_size=size, timeout_s=20)
        with pytest.raises(UnsupportedError) as error:
            staged.step([chosen.batch(0, False)])
        found.append(str(error.value))
    model: Any = chosen.build()
    model.lm_head.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(UnsupportedError) as error:
        training.stages(model, chosen.loss, tensor_parallel_size=size, timeout_s=20)
    return [*found, str(error.value)]


def test_what_would_be_wrong_in_silence_is_refused() -> None:
    for found in run_ranks(2, refused, timeout=60):
        for text, part in zip(found, ("(square)", "(T)", "has a hook on its gradient"), strict=True):
            assert text.startswith("lm_head.weight ")
            assert part in text


def early(rank: int, size: int, method: str) -> list[float]:
    """An optimizer that was made before the model was cut, and gradients of before."""
    join(rank, size, method)
    chosen = task("llama")
    plain, model = chosen.build(), chosen.build()
    losses = []
    for one in (plain, model):
        chosen.loss(one, chosen.batch(5, False)).backward()
    mine, other = (torch.optim.SGD(one.parameters(), lr=0.3, momentum=0.5) for one in (model, plain))
    staged = training.stages(model, chosen.loss, tensor_parallel_size=size, timeout_s=20)
    for _ in range(4):
        losses.append(accumulate(plain, chosen.loss, [chosen.batch(0, False)]))
        losses.append(float(staged.step([chosen.batch(0, False)])))
        for optimizer in (mine, other):
            optimizer.step()
            optimizer.zero_grad()
    return losses


def test_an_optimizer_may_be_made_before() -> None:
    for found in run_ranks(2, early, timeout=60):
        assert found[1::2] == pytest.approx(found[::2], rel=1e-4)
        assert found[-1] < 0.9 * found[0]


def summed_whole(rank: int, size: int, method: str) -> tuple[float, list[float]]:
    """Weights that every rank has whole stay the same bits on all; return the worst of their differences."""
    join(rank, size, method)
    chosen = wan()
    staged = training.stages(chosen.build(), chosen.loss, tensor_parallel_size=size, timeout_s=30)
    optimizer = torch.optim.AdamW(staged.parameters(), lr=1e-2)
    for _ in range(3):
        staged.step([chosen.batch(0, False)])
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: one for name, one in staged.named_parameters() if name not in staged.slices.cuts}
    return float(len(whole)), [float(one.detach().double().sum()) for one in whole.values()]


def test_whole_weights_stay_the_same_on_all_ranks() -> None:
    one, other = run_ranks(2, summed_whole, timeout=60)
    assert one == other
    assert one[0] > 0
