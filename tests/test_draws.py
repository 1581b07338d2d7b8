"""Models that draw random numbers in their forward: as on one rank, or refused on all ranks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.models import tiny
from tests.brought import pipeline
from tests.ranks import run_ranks
from tests.test_parallelize import join

CONFIGS = {
    "stages": DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False),
    "guidance": DiffusionParallelConfig(cfg_parallel_size=2, split_batch=False),
    "slices": DiffusionParallelConfig(tensor_parallel_size=2),
}


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
    """Nothing is drawn in the first calls."""
    calls = []

    def hook(_: Any, __: Any, out: Any) -> Any:
        calls.append(1)
        return (out[0], out[1] + 0.1 * torch.randn(out[1].shape)) if len(calls) > 4 else out

    model.transformer_blocks[0].register_forward_hook(hook)


ALL = (noise_on_the_prompt, noise_on_the_result, stochastic_depth, block_left_out_at_random, rare_noise)
REFUSED: dict[str, dict[Callable[[Any], None], str]] = {
    "stages": {
        noise_on_the_result: "draws random numbers in its forward, and stages leave it after their last block",
        stochastic_depth: "block transformer_blocks.0 draws random numbers",
        block_left_out_at_random: "block transformer_blocks.0 draws random numbers",
        rare_noise: "draws random numbers on some ranks only",
    },
    "guidance": {
        noise_on_the_prompt: "draws random numbers in its forward, and each guidance rank runs other branches",
        noise_on_the_result: "draws random numbers in its forward, and each guidance rank runs other branches",
        stochastic_depth: "block transformer_blocks.0 draws random numbers",
        block_left_out_at_random: "block transformer_blocks.0 draws random numbers",
        rare_noise: "draws random numbers on some ranks only",
    },
    "slices": {rare_noise: r"draws random numbers in some of its calls.*Plan\(overlap=False\)"},
}


def drawn(change: Callable[[Any], None], spread: Callable[[Any], Any]) -> torch.Tensor:
    pipe = pipeline("qwen-image")
    change(pipe.transformer)
    pipe = spread(pipe)
    torch.manual_seed(1)
    random.seed(1)
    call = {**tiny.defaults("qwen-image"), "prompt": "a cat", "negative_prompt": "a dog", "true_cfg_scale": 4.0}
    call |= {"num_inference_steps": 5, "output_type": "latent"}
    return pipe(**call, generator=torch.Generator().manual_seed(3)).images


def on_ranks(rank: int, count: int, method: str, axis: str) -> dict[str, Any]:
    join(rank, count, method)
    found: dict[str, Any] = {}
    for change in ALL:
        try:
            found[change.__name__] = drawn(change, lambda pipe: shardit.parallelize(pipe, CONFIGS[axis], timeout_s=60))
        except UnsupportedError as error:
            found[change.__name__] = str(error)
    return found


@pytest.mark.parametrize("axis", CONFIGS)
def test_draws(axis: str) -> None:
    tiny.resolve("tiny/qwen-image")
    results = run_ranks(2, on_ranks, axis)
    for change in ALL:
        pattern = REFUSED[axis].get(change)
        plain = drawn(change, lambda pipe: pipe) if pattern is None else None
        for result in results:
            got = result[change.__name__]
            if plain is None:
                with pytest.raises(UnsupportedError, match=pattern):
                    raise UnsupportedError(got)
                continue
            assert isinstance(got, torch.Tensor), (change.__name__, got)
            assert float((plain - got).norm() / plain.norm()) <= (1e-5 if axis == "slices" else 0), change.__name__
