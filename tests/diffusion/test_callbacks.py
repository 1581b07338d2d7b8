"""Callbacks that run in another pipeline than the one that was called, or call models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import shardit
from shardit import DiffusionParallelConfig, InputError
from tests.diffusion.test_parallelize import join
from tests.pipelines.entry import entries
from tests.support.brought import Shard, pipeline, run
from tests.support.ranks import run_ranks

AXES = {
    "stages": (DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False), 0.0),
    "slices": (DiffusionParallelConfig(tensor_parallel_size=2), 2e-5),
}
Inputs = dict[str, Any]


def smaller(_: Any, step: int, __: Any, given: Inputs) -> Inputs:
    return {"latents": given["latents"] * 0.9}


def in_a_decoder(shard: Shard) -> list[torch.Tensor]:
    """A pipeline made of two, which gives its callback to the second."""
    entry = entries()["KandinskyV22CombinedPipeline"]
    torch.manual_seed(0)
    pipe = shard(entry.build())

    def result(callback: Any) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1)
        call = {**entry.call(), "num_inference_steps": 4, "generator": draw, "output_type": "pt"}
        return pipe(**call, callback_on_step_end=callback).images

    def stop(pipe: Any, step: int, _: Any, given: Inputs) -> Inputs:
        pipe._interrupt = step == 1
        return smaller(pipe, step, _, given)

    return [result(None), result(smaller), result(stop)]


class Twice(diffusers.FluxPipeline):
    """Refines its own result with the same callback."""

    def __call__(self, *args: Any, callback_on_step_end: Any = None, **kwargs: Any) -> Any:
        made = super().__call__(*args, callback_on_step_end=callback_on_step_end, **{**kwargs, "output_type": "pt"})
        refiner = diffusers.FluxImg2ImgPipeline(**self.components)
        more = {**kwargs, "image": made.images, "strength": 0.6, "num_inference_steps": 4}
        return refiner(*args, callback_on_step_end=callback_on_step_end, **more)


def in_two_pipelines(shard: Shard) -> list[torch.Tensor]:
    pipe = pipeline("flux")
    pipe.__class__ = Twice
    pipe = shard(pipe)
    return [run(pipe, "flux"), run(pipe, "flux", callback_on_step_end=smaller)]


def of_a_model(shard: Shard) -> list[torch.Tensor]:
    """A callback that returns what a component has just made, and nobody has read yet."""
    pipe = shard(pipeline("sd3.5"))

    def encode(pipe: Any, step: int, _: Any, given: Inputs) -> Inputs:
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        made = pipe.vae.encode(pixels).latent_dist.mode()
        return {"latents": made} if made.shape == given["latents"].shape else given

    height = {"height": 32, "width": 32}
    return [run(pipe, "sd3.5", **height), run(pipe, "sd3.5", **height, callback_on_step_end=encode)]


CASES: tuple[Callable[[Shard], list[torch.Tensor]], ...] = (in_a_decoder, in_two_pipelines, of_a_model)


def differences(rank: int, count: int, method: str, axis: str) -> list[float]:
    join(rank, count, method)

    def shard(pipe: Any) -> Any:
        shardit.parallelize(pipe, AXES[axis][0], timeout_s=60)
        return pipe

    found = []
    for case in CASES:
        plain, sharded = case(lambda pipe: pipe), case(shard)
        assert not any(torch.equal(plain[0], one) for one in plain[1:]), case.__name__  # the callback has an effect
        found += [float((a - b).abs().max() / a.abs().max()) for a, b in zip(plain, sharded, strict=True)]
    return found


@pytest.mark.parametrize("axis", list(AXES))
def test_callbacks(axis: str) -> None:
    for found in run_ranks(2, differences, axis):
        assert max(found) <= AXES[axis][1]


def previews(rank: int, count: int, method: str) -> None:
    """A VAE that is used in a callback first: what its own code sets on it, on the rank that runs it, is no change."""
    join(rank, count, method)
    outs, seen = [], list[torch.Tensor]()

    def preview(pipe: Any, step: int, _: Any, given: Inputs) -> Inputs:
        seen.append(pipe.vae.decode(given["latents"], return_dict=False)[0].clone())
        return given

    for shard in (lambda pipe: pipe, lambda pipe: shardit.parallelize(pipe, AXES["stages"][0], timeout_s=60)):
        pipe = shard(pipeline("wan2.2-ti2v"))
        outs.append([run(pipe, "wan2.2-ti2v", callback_on_step_end=preview), run(pipe, "wan2.2-ti2v")])
    assert all(map(torch.equal, *outs))
    half = len(seen) // 2
    assert half
    assert all(map(torch.equal, seen[:half], seen[half:]))

    def change(pipe: Any, step: int, time: Any, given: Inputs) -> Inputs:
        pipe.vae.tile_sample_min_height += rank
        return preview(pipe, step, time, given)

    with pytest.raises(InputError, match=r"differ in changes of vae \(tile_sample_min_height\) after callback"):
        run(pipe, "wan2.2-ti2v", callback_on_step_end=change)


def test_previews() -> None:
    run_ranks(2, previews)
