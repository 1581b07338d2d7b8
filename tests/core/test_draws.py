"""Models that draw random numbers in their forward: as on one rank, or refused on all ranks."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardit import UnsupportedError
from shardit.core.comm.agreement import Agreement
from shardit.models import tiny
from tests.support.guided import check, outcomes
from tests.support.ranks import run_ranks


def noise_on_the_prompt(model: Any) -> None:
    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs["encoder_hidden_states"]
        return args, {**kwargs, "encoder_hidden_states": given + 0.1 * torch.randn(given.shape)}

    model.register_forward_pre_hook(hook, with_kwargs=True)


def noise_on_the_result(model: Any) -> None:
    model.register_forward_hook(lambda _, __, out: (out[0] + 0.1 * torch.randn(out[0].shape),))


def stochastic_depth(model: Any) -> None:
    class Depth(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.empty([1] * x.ndim).bernoulli_(0.9)

    for block in model.transformer_blocks:
        block.img_mlp.net.append(Depth())


def block_left_out_at_random(model: Any) -> None:
    block = model.transformer_blocks[0]
    plain = block.forward

    def forward(hidden_states: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if random.random() < 0.3:
            return encoder_hidden_states, hidden_states
        return plain(hidden_states, encoder_hidden_states, *args, **kwargs)

    block.forward = forward


def rare_noise(model: Any) -> None:
    """Draws nothing in the first calls. The counter is not a variable enclosed by the hook, so no check finds it."""
    os.environ["CALLS"] = ""

    def hook(_: Any, __: Any, out: Any) -> Any:
        os.environ["CALLS"] += "1"
        return (out[0], out[1] + 0.1 * torch.randn(out[1].shape)) if len(os.environ["CALLS"]) > 4 else out

    model.transformer_blocks[0].register_forward_hook(hook)


def rare_noise_of_its_own(model: Any) -> None:
    """The same, from a generator that the hook owns."""
    os.environ["CALLS"], own = "", torch.Generator().manual_seed(1)

    def hook(_: Any, __: Any, out: Any) -> Any:
        os.environ["CALLS"] += "1"
        if len(os.environ["CALLS"]) <= 4:
            return out
        return out[0], out[1] + 0.1 * torch.randn(out[1].shape, generator=own)

    model.transformer_blocks[0].register_forward_hook(hook)


ALL = (
    noise_on_the_prompt,
    noise_on_the_result,
    stochastic_depth,
    block_left_out_at_random,
    rare_noise,
    rare_noise_of_its_own,
)
REFUSED: dict[str, dict[Callable[[Any], None], str]] = {
    "stages": {
        noise_on_the_result: "draws random numbers in its forward, and stages leave it after their last block",
        stochastic_depth: "block transformer_blocks.0 draws random numbers",
        block_left_out_at_random: "block transformer_blocks.0 draws random numbers",
        rare_noise: "draws random numbers on some ranks only",
        rare_noise_of_its_own: "draws random numbers on some ranks only",
    },
    "guidance": {
        noise_on_the_prompt: "draws random numbers in its forward, and each guidance rank runs other branches",
        noise_on_the_result: "draws random numbers in its forward, and each guidance rank runs other branches",
        stochastic_depth: "block transformer_blocks.0 draws random numbers",
        block_left_out_at_random: "block transformer_blocks.0 draws random numbers",
        rare_noise: "draws random numbers on some ranks only",
        rare_noise_of_its_own: "draws random numbers on some ranks only",
    },
    "slices": dict.fromkeys(
        (rare_noise, rare_noise_of_its_own), r"draws random numbers in some of its calls.*Plan\(overlap=False\)"
    ),
}


@pytest.mark.parametrize("axis", ["stages", "guidance", "slices"])
def test_draws(axis: str) -> None:
    tiny.resolve("tiny/qwen-image")
    for of_rank in run_ranks(2, outcomes, axis, ALL):
        for change, got in zip(ALL, of_rank, strict=True):
            if change in REFUSED[axis]:
                assert isinstance(got, str), change.__name__
                assert re.search(REFUSED[axis][change], got), got
            else:
                check(got, change, 1e-5 if axis == "slices" else 0)


def test_a_request_that_draws_is_refused_and_forgotten() -> None:
    agreement = Agreement(SimpleNamespace(size=2))  # pyright: ignore[reportArgumentType]
    agreement.refuse_draws()
    agreement.drawing.add("Model")
    with pytest.raises(UnsupportedError, match="Model draws random numbers on some ranks only"):
        agreement.refuse_draws()
    agreement.refuse_draws()
