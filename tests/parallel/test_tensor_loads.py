"""Whole weights that are loaded into models, and parts of models, that are cut over tensor ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

import shardit
from shardit import DiffusionParallelConfig
from tests.diffusion.test_parallelize import join
from tests.pipelines.entry import entries
from tests.pipelines.of_animatediff import adapter
from tests.pipelines.parts import filled
from tests.pipelines.runs import arrays_of, distance
from tests.support import brought
from tests.support.ranks import run_ranks

TWO = DiffusionParallelConfig(tensor_parallel_size=2)
CLOSE = 1e-5


def scaled(model: Any, factor: float) -> dict[str, torch.Tensor]:
    return {name: value * factor for name, value in model.state_dict().items()}


def loaded(shard: Callable[[Any], Any]) -> list[torch.Tensor]:
    """A whole model, a block, and an encoder; with an adapter; from linears that were fused; what it held before."""
    whole = brought.pipeline("flux")
    pipe = shard(brought.pipeline("flux"))
    model, block, outs = pipe.transformer, whole.transformer.transformer_blocks[1], []
    before = model.state_dict(keep_vars=False)

    def see() -> None:
        outs.append(brought.run(pipe, "flux"))

    model.load_state_dict(scaled(whole.transformer, 1.05))
    pipe.text_encoder_2.load_state_dict(scaled(whole.text_encoder_2, 0.9))
    see()
    model.transformer_blocks[1].load_state_dict(scaled(block, 0.8), assign=True)
    see()
    pipe.load_lora_weights(adapted(whole.transformer), adapter_name="one")
    values = {name.replace("to_q.", "to_q.base_layer."): v for name, v in scaled(block, 1.1).items()}
    model.transformer_blocks[1].load_state_dict(values, strict=False)
    see()
    pipe.unload_lora_weights()
    model.fuse_qkv_projections()
    whole.transformer.fuse_qkv_projections()
    model.load_state_dict(scaled(whole.transformer, 0.95))
    see()
    model.unfuse_qkv_projections()
    model.load_state_dict(before, strict=False)
    see()
    return outs


def adapted(model: Any) -> dict[str, torch.Tensor]:
    generator, layers = torch.Generator().manual_seed(0), {}
    for name, module in model.named_modules():
        if name.endswith("attn.to_q"):
            layers[f"transformer.{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            layers[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator)
    return layers


def motion(shard: Callable[[Any], Any]) -> list[torch.Tensor]:
    """Other motion modules."""
    entry = entries()["AnimateDiffPipeline"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = shard(entry.build())
    outs = []
    for seed in (None, "other"):
        if seed is not None:
            pipe.unet.load_motion_modules(filled(adapter(), seed))
        torch.manual_seed(0)
        outs.append(pipe(**entry.call(), generator=torch.Generator().manual_seed(1)))
    return outs


def on_ranks(rank: int, count: int, method: str) -> list[float]:
    join(rank, count, method)
    found = []
    for case in (loaded, motion):
        expected, got = case(lambda pipe: pipe), case(lambda pipe: shardit.parallelize(pipe, TWO, timeout_s=60))
        assert distance(arrays_of(expected[0]), arrays_of(expected[1])) > 1e-3
        found += [distance(arrays_of(a), arrays_of(b)) for a, b in zip(expected, got, strict=True)]
    return found


def test_whole_weights_are_loaded_as_slices() -> None:
    for errors in run_ranks(2, on_ranks):
        assert max(errors) <= CLOSE, errors


def loaded_plainly(shard: Callable[[Any], Any]) -> list[torch.Tensor]:
    """Whole weights copied into a transformer over stages, and into parts that one rank owns or that are cut."""
    pipe, whole = shard(brought.pipeline("flux")), brought.pipeline("flux")
    outs = [brought.run(pipe, "flux")]
    for name in ("transformer", "text_encoder_2", "text_encoder"):
        getattr(pipe, name).load_state_dict(scaled(getattr(whole, name), 1.02))
        outs.append(brought.run(pipe, "flux"))
    latents = torch.linspace(-1, 1, 16 * 16).view(1, 16, 4, 4)
    for factor in (1.0, 1.02):
        pipe.vae.load_state_dict(scaled(whole.vae, factor))
        with torch.no_grad():
            outs.append(pipe.vae.decode(latents).sample + 0)
    return outs


def over_stages(rank: int, size: int, method: str) -> list[torch.Tensor]:
    join(rank, size, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch warns of copies to meta tensors, which do nothing
        return loaded_plainly(lambda pipe: shardit.parallelize(pipe, pipeline_parallel_size=size, timeout_s=60))


def test_stages_and_owned_parts_take_what_they_hold() -> None:
    plain = loaded_plainly(lambda pipe: pipe)
    assert not any(torch.equal(before, after) for before, after in pairwise(plain) if before.shape == after.shape)
    for got in run_ranks(2, over_stages, timeout=120):
        assert all(map(torch.equal, plain, got))
