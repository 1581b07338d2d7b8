"""Pipelines that share components, and `parallelize` on what is already sharded."""

from __future__ import annotations

import copy
import re
from typing import Any

import diffusers
import pytest
import torch

import shardit
from shardit import DiffusionParallelConfig, InputError, Plan
from shardit.diffusion.sharding.component_sharding import sharding_of
from shardit.models import tiny
from tests.diffusion.test_parallelize import join
from tests.support.brought import pipeline
from tests.support.ranks import run_ranks

STAGES = DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False)
SLICES = DiffusionParallelConfig(tensor_parallel_size=2)


def text_to_image(pipe: Any) -> torch.Tensor:
    call = {**tiny.defaults("flux"), "prompt": "a cat", "output_type": "pt"}
    return pipe(**call, generator=torch.Generator().manual_seed(3)).images


def image_to_image(pipe: Any) -> torch.Tensor:
    call = {**tiny.defaults("flux"), "num_inference_steps": 4, "prompt": "a cat", "output_type": "pt"}
    size = call["height"], call["width"]
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    return pipe(**call, image=picture, strength=0.6, generator=torch.Generator().manual_seed(3)).images


def second_model(one: Any) -> Any:
    """Another transformer with the same weights."""
    made = diffusers.FluxTransformer2DModel.from_config(one.transformer.config)
    made.load_state_dict(one.transformer.state_dict())
    return made.eval()


def refiner(base: Any, transformer: Any) -> Any:
    """A pipeline with a transformer of its own; all else is the base's."""
    return diffusers.FluxImg2ImgPipeline(**{**base.components, "transformer": transformer})


def error(act: Any) -> str:
    with pytest.raises(InputError) as caught:
        act()
    return str(caught.value)


def sharded_twice(rank: int, count: int, method: str, config: DiffusionParallelConfig) -> dict[str, Any]:
    join(rank, count, method)
    said: dict[str, Any] = {}
    base = pipeline("flux")
    other = second_model(base)
    shardit.parallelize(base, config, timeout_s=60)
    runtime = base.shardit_runtime
    said["text 1"] = text_to_image(base)
    held = {name: [p.is_meta for p in part.parameters()] for name, part in parts(base)}
    classes = {name: type(part) for name, part in parts(base)}
    assert shardit.parallelize(base, config, timeout_s=5) is base
    assert {name: type(part) for name, part in parts(base)} == classes
    assert {name: [p.is_meta for p in part.parameters()] for name, part in parts(base)} == held
    said["text 2"] = text_to_image(base)
    second = refiner(base, other)
    assert not hasattr(second, "shardit_runtime")
    shardit.parallelize(second, config)
    assert second.shardit_runtime is runtime
    assert sharding_of(other) is not None
    said["image 1"] = image_to_image(second)
    said["text 3"] = text_to_image(base)
    for kind in (diffusers.FluxImg2ImgPipeline, diffusers.FluxPipeline, type(base)):
        made = kind.from_pipe(base)
        assert made.shardit_runtime is runtime
        shardit.parallelize(made, config)
        act, name = (text_to_image, "text") if issubclass(kind, diffusers.FluxPipeline) else (image_to_image, "image")
        said[f"{name} from_pipe {kind.__name__} {kind is type(base)}"] = act(made)
    model = second_model(pipeline("flux"))
    whole = pipeline("flux")
    shardit.parallelize(model, config)
    whole.transformer = model
    shardit.parallelize(whole, config)
    said["text of a model that came first"] = text_to_image(whole)
    said["errors"] = [
        error(lambda: shardit.parallelize(base, SLICES if config == STAGES else STAGES)),
        error(lambda: shardit.parallelize(base.transformer, config, plan=Plan(order=("transformer_blocks",)))),
        error(lambda: shardit.parallelize(refiner(base, model), config)),
        error(lambda: text_to_image(changed(base, "vae", pipeline("flux").vae))),
        error(lambda: text_to_image(changed(base, "vae", whole.vae))),
    ]
    base.vae = pipeline("flux").vae
    shardit.parallelize(base, config)
    said["text with another VAE"] = text_to_image(base)
    return said


def parts(pipe: Any) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]


def changed(pipe: Any, name: str, part: Any) -> Any:
    made = copy.copy(pipe)
    setattr(made, name, part)
    return made


@pytest.mark.parametrize("config", [STAGES, SLICES], ids=["stages", "slices"])
def test_parts_that_are_sharded_already(config: DiffusionParallelConfig) -> None:
    plain = pipeline("flux")
    expected = {"text": text_to_image(plain), "image": image_to_image(refiner(plain, plain.transformer))}
    one, other = run_ranks(2, sharded_twice, config)
    assert one["errors"] == other["errors"]
    for text, pattern in zip(
        one["errors"],
        (
            r"is already sharded, with .*_parallel_size=\d .now",
            "FluxTransformer2DModel is already sharded, with None: leave out the plan",
            "different pipelines",
            "vae was put into the pipeline after parallelize",
            "vae belongs to a pipeline that was sharded separately",
        ),
        strict=True,
    ):
        assert re.search(pattern, text), text
    for said in (one, other):
        for name, got in said.items():
            if name == "errors":
                continue
            wanted = expected[name.split()[0]]
            if config is STAGES:
                assert torch.equal(got, wanted), name
            else:
                assert float((got - wanted).norm() / wanted.norm()) < 1e-5, name
