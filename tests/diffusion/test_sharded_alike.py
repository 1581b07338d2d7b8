"""Decisions of ranks while sharding: the same on all, or refused on all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import shardit
from shardit import DiffusionParallelConfig, InputError
from shardit.diffusion.sharding.component_sharding import sharding_of
from tests.diffusion.test_parallelize import join
from tests.pipelines import of_controlnet, of_stable_diffusion_base, parts
from tests.support.brought import pipeline
from tests.support.ranks import run_ranks

CONFIGS = {
    "stages": DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False),
    "guidance": DiffusionParallelConfig(cfg_parallel_size=2, split_batch=False),
    "slices": DiffusionParallelConfig(tensor_parallel_size=2),
}
SPATIAL = (4, 8)


def held(rank: int, count: int, method: str, name: str) -> dict[str, list[float]]:
    """Return the reported bytes of each member for each component, T5 with its tied weights among them."""
    join(rank, count, method)
    pipe = shardit.parallelize(pipeline("flux"), CONFIGS[name], timeout_s=60)
    placed = {name: sharding_of(part) for name, part in pipe.components.items()}
    return {name: [one.bytes_of(member) for member in range(count)] for name, one in placed.items() if one is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_ranks_count_the_same_bytes(name: str) -> None:
    one, other = run_ranks(2, held, name)
    assert one == other
    encoder = pipeline("flux").text_encoder_2
    assert sum(one["text_encoder_2"]) == sum(p.nbytes for p in encoder.parameters())


def with_controlnet(nets: Any, components: dict[str, Any]) -> Any:
    made: Any = diffusers.StableDiffusionControlNetPipeline
    return made(**{**components, "controlnet": nets})


def picture(pipe: Any, count: int) -> torch.Tensor:
    pictures = [parts.picture(seed=seed) for seed in range(count)]
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
    given = pictures[0] if count == 1 else pictures
    return pipe(**call, image=given, generator=torch.Generator().manual_seed(1)).images


def half_vae(shard: Callable[[Any], Any]) -> None:
    """One rank has a component in another dtype."""
    pipe = pipeline("flux")
    if torch.distributed.get_rank() == 0:
        pipe.vae.to(torch.bfloat16)
    shard(pipe)


def offloaded_on_one(shard: Callable[[Any], Any]) -> None:
    pipe = pipeline("flux")
    if torch.distributed.get_rank() == 1:
        pipe.vae._hf_hook = None
    shard(pipe)


def other_blocks(shard: Callable[[Any], Any]) -> None:
    """A model outside a pipeline with fewer blocks on one rank."""
    model = pipeline("flux").transformer
    if torch.distributed.get_rank() == 1:
        del model.transformer_blocks[-1]
    shard(model)


def one_of_two(shard: Callable[[Any], Any]) -> None:
    nets = [of_controlnet.controlnet(), of_controlnet.controlnet(conditioning_embedding_out_channels=SPATIAL)]
    both = shard(with_controlnet(nets, of_stable_diffusion_base.components()))
    shard(with_controlnet(both.controlnet.nets[0], both.components))


def two_of_one(shard: Callable[[Any], Any]) -> None:
    one = shard(with_controlnet(of_controlnet.controlnet(), of_stable_diffusion_base.components()))
    other = of_controlnet.controlnet(conditioning_embedding_out_channels=SPATIAL)
    shard(with_controlnet([one.controlnet, other], one.components))


def a_part_alone(shard: Callable[[Any], Any]) -> None:
    shard(shard(pipeline("flux")).transformer.transformer_blocks[0])


REFUSED: dict[Callable[[Callable[[Any], Any]], None], str] = {
    half_vae: "ranks would shard .*vae.* of FluxPipeline in different ways",
    offloaded_on_one: "vae is offloaded",
    other_blocks: "FluxTransformer2DModel in different ways",
    one_of_two: "controlnet is a part of controlnet, which is already sharded: parallelize the pipeline that has both",
    two_of_one: r"controlnet\.nets\.0 is controlnet, which is already sharded: parallelize the pipeline that has both",
    a_part_alone: "FluxTransformerBlock is a part of transformer, which is already sharded",
}


def refusals(rank: int, count: int, method: str, name: str) -> list[str]:
    join(rank, count, method)
    said = []
    for act, why in REFUSED.items():
        since = time.monotonic()
        with pytest.raises(InputError, match=why):
            act(lambda thing: shardit.parallelize(thing, CONFIGS[name], timeout_s=60))
        assert time.monotonic() - since < 30, "a rank waited for others"
        said.append(act.__name__)
    return said


@pytest.mark.parametrize("name", CONFIGS)
def test_different_decisions_of_ranks_are_refused_on_all(name: str) -> None:
    for said in run_ranks(2, refusals, name):
        assert said == [act.__name__ for act in REFUSED]


def copied(rank: int, count: int, method: str) -> list[torch.Tensor]:
    """A ControlNet alone and its copy next to another one."""
    import copy

    if count > 1:
        join(rank, count, method)
    net, other = of_controlnet.controlnet(), of_controlnet.controlnet(conditioning_embedding_out_channels=SPATIAL)
    one = with_controlnet(net, of_stable_diffusion_base.components())
    two = with_controlnet([copy.deepcopy(net), other], one.components)
    if count > 1:
        one, two = (shardit.parallelize(pipe, CONFIGS["stages"], timeout_s=60) for pipe in (one, two))
    return [picture(one, 1), picture(two, 2), picture(one, 1)]


def test_copies_of_a_part_are_right() -> None:
    expected = copied(0, 1, "")
    for outs in run_ranks(2, copied):
        assert all(torch.equal(a, b) for a, b in zip(expected, outs, strict=True))
