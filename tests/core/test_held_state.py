"""State that a block leaves outside of tensors, on one rank only: found in the first call, and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.core.modules.state.contents import content_of, restore_content, written
from shardit.core.modules.state.module_state import differences, state_of
from shardit.models import tiny
from tests.diffusion.test_parallelize import join
from tests.support.brought import pipeline
from tests.support.ranks import run_ranks

CONFIGS = {
    "stages": DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False),
    "guidance": DiffusionParallelConfig(cfg_parallel_size=2, split_batch=False),
}


class Store:
    def __init__(self) -> None:
        self.maps: dict[str, list[torch.Tensor]] = {"seen": []}


class Remembering(FluxAttnProcessor):
    """Stores its results in an object of the pipeline's, as attention stores do."""

    def __init__(self, store: Store | None) -> None:
        super().__init__()
        self.store = store

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        if self.store is not None:
            self.store.maps["seen"].append(out)
        return out


def latents(pipe: Any, seed: int = 3) -> torch.Tensor:
    call = {**tiny.defaults("flux"), "prompt": "a cat", "output_type": "latent"}
    return pipe(**call, generator=torch.Generator().manual_seed(seed)).images


def cases(rank: int, count: int, method: str, name: str) -> tuple[bool, list[str], bool]:
    join(rank, count, method)
    plain = latents(pipeline("flux"))
    pipe = shardit.parallelize(pipeline("flux"), CONFIGS[name], timeout_s=60)
    pipe.transformer.set_attn_processor(Remembering(None))
    equal = torch.equal(latents(pipe), plain)
    said = []
    pipe.transformer.set_attn_processor(Remembering(Store()))  # after calls whose plan is known
    with pytest.raises(UnsupportedError) as refused:
        latents(pipe)
    said.append(str(refused.value))
    pipe.transformer.set_attn_processor(FluxAttnProcessor())
    again = torch.equal(latents(pipe), plain)
    return equal, said, again


@pytest.mark.parametrize("name", list(CONFIGS))
def test_state_of_processors_is_refused_on_all_ranks(name: str) -> None:
    tiny.resolve("tiny/flux")
    for equal, said, again in run_ranks(2, cases, name):
        assert equal
        assert again
        assert "attn.processor.store.maps.seen in each of its calls" in said[0]


class Slotted:
    __slots__ = ("kept", "unset")

    def __init__(self) -> None:
        self.kept: list[int] = []


def test_tensors_in_slots_are_found() -> None:
    block = torch.nn.Module()
    block.processor = Slotted()
    before = state_of(block)
    assert differences(before, state_of(block)) == []
    block.processor.kept.append(1)
    assert differences(before, state_of(block)) == ["processor.kept"]


@pytest.mark.parametrize("size", [8, 100])  # small ones are copied
def test_weights_that_get_other_data_in_inference_mode(size: int) -> None:
    """Layerwise casting does that; these tensors have no version, and a trial call restores nothing."""
    weight = torch.nn.Parameter(torch.ones(size))
    before = content_of("weight", weight, copies=True, outside=False)
    with torch.inference_mode():
        weight.data = weight.data.bfloat16().float()
    after = content_of("weight", weight, copies=True, outside=False)
    assert before is not None
    assert after is not None
    assert after.version is None
    assert not written(before, after)
    restore_content(before)
