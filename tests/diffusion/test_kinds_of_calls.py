"""Calls and blocks that differ in values, settings or code, ranks that differ, and errors in later calls: each is right
on every rank, or an error on all of them."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils import prune

import shardit
from shardit import DiffusionParallelConfig
from shardit.models import tiny
from tests.diffusion.test_changes import flux, lora, run
from tests.diffusion.test_parallelize import join
from tests.pipelines.of_stable_diffusion_base import unet
from tests.support.ranks import run_ranks

AXES = {
    "stages": DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False),
    "slices": DiffusionParallelConfig(tensor_parallel_size=2),
    "ring": DiffusionParallelConfig(ring_degree=2),
}
Shard = Callable[[Any], Any]
Result = torch.Tensor | str


def attempt(call: Callable[[], torch.Tensor]) -> Result:
    """Return the result of a call, or its error in one line."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def with_arguments(pipe: Any, **attention: Any) -> torch.Tensor:
    call = {**tiny.defaults("flux"), "prompt": "a cat", "output_type": "latent"}
    draw = torch.Generator().manual_seed(3)
    return pipe(**call, joint_attention_kwargs=attention, generator=draw).images


class MixesHeads(FluxAttnProcessor):
    """Mixes the heads where an argument of the call says so."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, mix: Any = False, **kwargs: Any) -> Any:
        out = super().__call__(attn, hidden_states, *args, **kwargs)
        if not mix:
            return out
        more = attn.to_v(hidden_states).flip(-1) * 0.5
        return (out[0] + attn.to_out[0](more), *out[1:]) if isinstance(out, tuple) else out + more


class MixesTokens(FluxAttnProcessor):
    """Mixes the tokens as much as an argument of the call says."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, mix: float = 0.0, **kwargs: Any) -> Any:
        if mix:
            hidden_states = hidden_states + mix * hidden_states.mean(1, keepdim=True)
        return super().__call__(attn, hidden_states, *args, **kwargs)


class Strict(FluxAttnProcessor):
    """Raises for some values of an argument."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, strength: float = 1.0, **kwargs: Any) -> Any:
        if strength > 1:
            raise ValueError("strength must be at most 1")
        return super().__call__(attn, hidden_states * strength, *args, **kwargs)


class ByNumber(FeedForward):
    """Mixes its channels in odd layers."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.net[0](x)
        return self.net[2](y + 0.5 * y.mean(-1, keepdim=True) if self.layer_idx % 2 else y)


def mixes_channels(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    y = self.net[0](x)
    return self.net[2](y + 0.5 * y.flip(-1))


def by_number(shard: Shard, rank: int) -> list[Result]:
    pipe = flux(4)
    for number, block in enumerate(pipe.transformer.transformer_blocks):
        block.ff.__class__ = ByNumber
        block.ff.layer_idx = number
    pipe = shard(pipe)
    return [run(pipe), run(pipe)]


def one_forward(shard: Shard, rank: int) -> list[Result]:
    pipe = flux(4)
    one = pipe.transformer.transformer_blocks[3].ff
    one.forward = types.MethodType(mixes_channels, one)
    return [run(shard(pipe))]


def by_object(shard: Shard, rank: int) -> list[Result]:
    """Feed-forwards read a flag of an object, and one has a function of its own."""
    pipe = flux(4)
    for number, block in enumerate(pipe.transformer.transformer_blocks):
        block.ff.settings = types.SimpleNamespace(flip=number == 3)
        block.ff.act = (lambda y: y) if number != 1 else (lambda y: y.roll(1, -1))
        block.ff.forward = types.MethodType(
            lambda self, x: self.net[2](self.act(self.net[0](x).flip(-1) if self.settings.flip else self.net[0](x))),
            block.ff,
        )
    return [run(shard(pipe))]


def by_argument(shard: Shard, rank: int) -> list[Result]:
    pipe = flux()
    pipe.transformer.set_attn_processor(MixesHeads())
    pipe = shard(pipe)
    return [with_arguments(pipe, mix=mix) for mix in (False, True, False, 0.5)]


def whole_weights(shard: Shard, rank: int) -> list[Result]:
    plain, pipe = flux().transformer, shard(flux())
    outs: list[Result] = [run(pipe)]
    for name, module in plain.named_modules():
        if name.endswith("ff.net.2"):
            pipe.transformer.get_submodule(name).weight = nn.Parameter(module.weight.detach() * 1.05)
    return [*outs, attempt(lambda: run(pipe))]


def written_weights(shard: Shard, rank: int) -> list[Result]:
    """Weights that code of a user changes by what it sees of them; loads before that are followed."""
    pipe, outs = shard(flux()), []
    model = pipe.transformer
    block = model.transformer_blocks[1]
    weights = flux().transformer.transformer_blocks[1].state_dict()
    block.load_state_dict({name: value * 0.9 for name, value in weights.items()})
    outs.append(run(pipe))
    with torch.no_grad():
        block.attn.to_q.weight.div_(block.attn.to_q.weight.norm())
    outs.append(attempt(lambda: run(pipe)))
    return outs


def pruned(shard: Shard, rank: int) -> list[Result]:
    pipe = shard(flux())
    prune.l1_unstructured(pipe.transformer.transformer_blocks[1].attn.to_q, "weight", 0.3)
    return [attempt(lambda: run(pipe))]


def injected(shard: Shard, rank: int) -> list[Result]:
    pipe = shard(flux())
    outs: list[Result] = [run(pipe)]
    torch.manual_seed(7)
    config = LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.transformer)
    return [*outs, attempt(lambda: run(pipe))]


def other_attention(shard: Shard, rank: int) -> list[Result]:
    plain = F.scaled_dot_product_attention

    def sharper(query: Any, *args: Any, scale: float | None = None, **kwargs: Any) -> Any:
        return plain(query, *args, scale=1.5 * (scale or query.shape[-1] ** -0.5), **kwargs)

    pipe = shard(flux())
    outs: list[Result] = [run(pipe)]
    try:
        F.scaled_dot_product_attention = sharper
        return [*outs, attempt(lambda: run(pipe))]
    finally:
        F.scaled_dot_product_attention = plain


def by_float(shard: Shard, rank: int) -> list[Result]:
    pipe = flux()
    pipe.transformer.set_attn_processor(MixesTokens())
    pipe = shard(pipe)
    return [attempt(partial(with_arguments, pipe, mix=mix)) for mix in (0.0, 0.5, 0.0)]


def fails_later(shard: Shard, rank: int) -> list[Result]:
    pipe = flux()
    pipe.transformer.single_transformer_blocks[1].attn.processor = Strict()
    pipe = shard(pipe)
    return [attempt(partial(with_arguments, pipe, strength=strength)) for strength in (0.9, 2.0, 0.9)]


def type_error(shard: Shard, rank: int) -> list[Result]:
    pipe = flux()
    pipe.transformer.set_attn_processor(Strict())
    pipe = shard(pipe)
    outs: list[Result] = [with_arguments(pipe, strength=1.0)]
    failed = attempt(lambda: with_arguments(pipe, strength="strong"))
    assert isinstance(failed, str)
    return [*outs, failed[failed.index("TypeError") :].replace("'", '"')]


def other_scales(shard: Shard, rank: int) -> list[Result]:
    pipe = shard(flux())
    lora(pipe, adapter_name="one")
    outs: list[Result] = [run(pipe)]
    pipe.set_adapters(["one"], [0.5 + rank])
    outs.append(attempt(lambda: run(pipe)))
    pipe.set_adapters(["one"], [0.5])
    return [*outs, run(pipe)]


def other_schedulers(shard: Shard, rank: int) -> list[Result]:
    pipe = shard(flux())
    if rank:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=2.0)
    return [attempt(lambda: run(pipe))]


def own_noise(shard: Shard, rank: int) -> list[Result]:
    """A scheduler that draws from a generator that each rank seeds in another way."""
    pipe = shard(flux())
    draw = np.random.default_rng(rank)

    class Noisy(type(pipe.scheduler)):
        def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
            return super().step(model_output + 0.1 * draw.standard_normal(), *args, **kwargs)

    pipe.scheduler = Noisy.from_config(pipe.scheduler.config)
    call = {**tiny.defaults("flux"), "prompt": "a cat", "output_type": "latent", "num_inference_steps": 3}
    return [attempt(lambda: pipe(**call, generator=torch.Generator().manual_seed(3)).images)]


def device_of_parameters(shard: Shard, rank: int) -> list[Result]:
    pipe, outs = shard(flux()), []
    with torch.no_grad():
        for part in (pipe.text_encoder, pipe.text_encoder_2):
            ids = torch.arange(7)[None].to(next(part.parameters()).device)
            outs.append(part(ids).last_hidden_state + 0)
        picture = torch.ones(1, 3, 16, 16).to(next(pipe.vae.parameters()).device)
        outs.append(pipe.vae.encode(picture).latent_dist.mode() + picture.mean())
    return outs


class Scorer(nn.Module):
    """A component with state of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(3, 4000)
        self.history: list[float] = []
        self.counts = {"calls": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(float(self.lin(x).mean()))
        self.counts["calls"] += 1
        return self.lin(x)

    def fill(self, out: np.ndarray) -> None:
        out[...] = float(self.lin.weight.sum())

    def maker(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = self.lin.weight.sum() + x.sum()
        return lambda y: y * weight


class Scored(DiffusionPipeline):
    def __init__(self, unet: Any, scorer: Any):
        super().__init__()
        self.register_modules(unet=unet, scorer=scorer)


def own_component(shard: Shard, rank: int) -> list[Result]:
    pipe = shard(Scored(unet(), Scorer()))
    x, array = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)), np.ones(3)
    with torch.no_grad():
        pipe.scorer(x)
        pipe.scorer(x)
        pipe.scorer.fill(array)
        seen = torch.tensor([*pipe.scorer.history, pipe.scorer.counts["calls"]])
        return [seen, torch.tensor(array), attempt(lambda: pipe.scorer.maker(x)(torch.ones(2)))]


def vae_alone(shard: Shard, rank: int) -> list[Result]:
    vae = flux().vae
    return [attempt(lambda: shard(vae) and torch.zeros(1))]


Case = Callable[[Shard, int], list[Result]]
CASES: dict[str, dict[Case, dict[int, str]]] = {
    "slices": {
        by_number: {},
        one_forward: {},
        by_object: {},
        by_argument: {},
        whole_weights: {1: r"^UnsupportedError: transformer.*ff.net.2.weight was replaced by a tensor of shape"},
        written_weights: {1: r"^UnsupportedError: transformer.*1.attn.to_q.weight was written to after parallelize"},
        pruned: {0: r"^UnsupportedError: transformer.*1.attn.to_q.weight was taken out of its module"},
        injected: {1: r"^UnsupportedError: an adapter was made on slices"},
        type_error: {},
    },
    "ring": {
        other_attention: {1: r"^NotInRing: ring_degree=2 does not work with .*sharper in place of F\."},
        by_float: {},
    },
    "stages": {
        fails_later: {},
        other_scales: {1: r"^InputError: ranks differ in adapters of transformer of FluxPipeline"},
        other_schedulers: {0: r"^InputError: ranks differ in configuration of scheduler of FluxPipeline"},
        own_noise: {0: r"^InputError: ranks differ in the last step of FluxPipeline"},
        device_of_parameters: {},
        own_component: {2: r"^UnsupportedError: a method of a component .*cannot be sent"},
        vae_alone: {0: r"^UnsupportedError: AutoencoderKL is no transformer"},
    },
}
"""By axis: cases, and the errors by the number of the result; all other results are those of one rank."""


def on_rank(rank: int, count: int, method: str, axis: str) -> dict[str, list[Result]]:
    join(rank, count, method)
    return {
        case.__name__: case(lambda p: shardit.parallelize(p, AXES[axis], timeout_s=60), rank) for case in CASES[axis]
    }


@pytest.mark.parametrize("axis", CASES)
def test_right_or_refused_on_all_ranks(axis: str) -> None:
    of_ranks = run_ranks(2, on_rank, axis)
    for case, errors in CASES[axis].items():
        plain = case(lambda pipe: pipe, 0)
        for found in (results[case.__name__] for results in of_ranks):
            assert len(found) == len(plain), case.__name__
            for number, (expected, got) in enumerate(zip(plain, found, strict=True)):
                where = case.__name__, number, got
                if number in errors:
                    assert isinstance(got, str), where
                    assert re.search(errors[number], got), where
                elif isinstance(expected, str):
                    assert got == expected, where
                else:
                    assert isinstance(got, torch.Tensor), where
                    assert (got - expected).norm() <= (0 if axis == "stages" else 1e-5) * expected.norm(), where
