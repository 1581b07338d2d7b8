"""Shapes and courses that follow values of the arguments: the plan is found again, on all ranks at once."""

from __future__ import annotations

import copy
import math
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardit
from shardit import DiffusionParallelConfig
from shardit.core.runtime.pending import materialize
from shardit.core.runtime.program import Program
from shardit.core.stages.transformer_stages import Runtime, TransformerStages
from tests.pipelines.entry import entries
from tests.support.awkward_models import WIDTH, Plain
from tests.support.ranks import run_ranks
from tests.support.survey_models import Draw, entry, randomise
from tests.support.survey_runs import runtime_of, same, staged


class Lengths(Plain):
    """Cuts the text to the length given by a mask, as Lumina 2 does."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x, e = self.first(x), self.time(t[:, None])[:, None]
        text = x[:, : mask.sum(1).tolist()[0]]
        for block in self.blocks[:3]:
            text = block(text, e)
        x = torch.cat([text, x], 1)
        for block in self.blocks[3:]:
            x = block(x, e)
        return self.last(x[:, text.shape[1] :])


class Course(Plain):
    """A value decides which blocks run, and what is kept from the first one."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x, e = self.first(x), self.time(t[:, None])[:, None]
        first = x
        for i, block in enumerate(self.blocks):
            if i == 4 and not mask[0, 0]:
                continue
            x = block(x, e)
            first = x if i == 0 else first
        return self.last(x + first * 2 if bool(mask[0, 1]) else x)


class Scaled(Plain):
    """Reads a number in each call, which changes nothing but the result."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        scale = 1 + float(t[0]) + mask.float().mean().item()
        return super().forward(x * scale, t)


MODELS = {"lengths": Lengths, "course": Course, "scaled": Scaled}
MASKS = ((1, 1, 1, 1, 1), (1, 1, 0, 0, 0), (0, 1, 1, 1, 1), (1, 0, 1, 1, 0), (1, 1, 0, 0, 0), (0, 0, 1, 1, 1))


def _inputs(seed: int, mask: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(1, 5, WIDTH, generator=generator), torch.rand(1, generator=generator)
    return x, t, torch.tensor([mask])


def _calls(model: nn.Module, runtime: Runtime, calls: list[Any], chunks: int) -> tuple[list[bool], TransformerStages]:
    """Whether each call gives the bits of the plain model, two calls in flight at a time."""
    run = (lambda call: model(**call)) if isinstance(calls[0], dict) else (lambda call: model(*call))
    with torch.no_grad():
        plain = [run(call) for call in calls]
    stages = staged(model, runtime, chunks)
    equal = []
    for i in range(0, len(calls), 2):
        got = [run(call) for call in calls[i : i + 2]]
        equal += [same(a, b) for a, b in zip(plain[i : i + 2], got, strict=False)]
    return equal, stages


def _lumina(seed: int, length: int) -> dict[str, Any]:
    draw = Draw(seed, True)
    mask = torch.zeros(1, draw.text, dtype=torch.int64)
    mask[:, :length] = 1
    return {
        "hidden_states": draw.image(4),
        "encoder_hidden_states": draw.words(16),
        "timestep": draw.t() / 1000,
        "encoder_attention_mask": mask,
    }


def _all(rank: int, size: int, method: str) -> dict[str, tuple[list[bool], int, int, int]]:
    runtime, found = runtime_of(rank, size, method), {}
    runs: list[tuple[str, nn.Module, list[Any]]] = [
        (name, randomise(cls()).eval(), [_inputs(i, mask) for i, mask in enumerate(MASKS)])
        for name, cls in MODELS.items()
    ]
    lengths = (7, 3, 5, 3, 7, 1)
    calls = [_lumina(i, length) for i, length in enumerate(lengths)]
    runs.append(("lumina2", entry("Lumina2Transformer2DModel").build(), calls))
    for name, model, calls in runs:
        for chunks in (1, 2):
            equal, stages = _calls(model, runtime, calls, chunks)
            found[f"{name}/{chunks}"] = equal, stages.first.traced, len(stages.plans), len(stages.known.found)
            model = (
                entry("Lumina2Transformer2DModel").build() if name == "lumina2" else randomise(MODELS[name]()).eval()
            )
    runtime.comm.flush()
    runtime.comm.group.barrier()
    return found


def test_plans_follow_values() -> None:
    """Equal bits; as many first calls as courses; values that change nothing cost no first call."""
    for found in run_ranks(2, _all):
        for name, (equal, traced, plans, contents) in found.items():
            assert all(equal), (name, equal)
            expected = {"lengths": (4, 4, 5), "course": (4, 4, 5), "scaled": (1, 1, 6), "lumina2": (4, 4, 4)}
            assert (traced, plans, contents) == expected[name.split("/")[0]], name


# A whole pipeline: prompts of several lengths, with and without guidance, several requests in flight.

CALLS = (
    ("a cat", 4.0),
    ("two dogs and a bird on a long red train", 4.0),
    ("hat", 1.0),
    ("a cat", 4.0),
    ("a b c d e f", 1.0),
)


def _call(number: int) -> dict[str, Any]:
    prompt, guidance = CALLS[number]
    generator = torch.Generator().manual_seed(number)
    return {
        **entries()["Lumina2Pipeline"].call(),
        "prompt": prompt,
        "guidance_scale": guidance,
        "generator": generator,
        "output_type": "latent",
    }


def _lumina_on(rank: int, size: int, method: str, axes: dict[str, int]) -> tuple[list[bool], list[bool], int]:
    """Whether each call gives the bits of plain diffusers, one after the other and together; first calls."""
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    pipe = entries()["Lumina2Pipeline"].build()
    pipe.set_progress_bar_config(disable=True)
    plain = [pipe(**_call(i)).images for i in range(len(CALLS))]
    shardit.parallelize(pipe, DiffusionParallelConfig(**axes, split_batch=False))
    stages = pipe.transformer.shardit_stages
    alone = [torch.equal(pipe(**_call(i)).images, plain[i]) for i in range(3)]

    def program(number: int) -> Program:
        other = copy.copy(pipe)
        other.scheduler = copy.deepcopy(pipe.scheduler)
        return Program(lambda: other(**_call(number)).images, seed=number)

    programs = [program(i) for i in range(len(CALLS))]
    together = []
    for ended in stages.runtime.loop.run(iter(programs), 3):
        if ended.error is not None:
            raise ended.error
        materialize(ended.value)
        together.append(torch.equal(ended.value, plain[programs.index(ended)]))
    stages.runtime.flush()
    stages.runtime.replica.group.barrier()
    return alone, together, stages.first.traced


@pytest.mark.parametrize(
    "axes",
    [
        {"pipeline_parallel_size": 2},
        pytest.param({"pipeline_parallel_size": 4}, marks=pytest.mark.full),
        pytest.param({"cfg_parallel_size": 2}, marks=pytest.mark.full),
        {"pipeline_parallel_size": 2, "cfg_parallel_size": 2},
    ],
)
def test_lumina_with_prompts_of_several_lengths(axes: dict[str, int]) -> None:
    size = math.prod(axes.values())
    found = run_ranks(size, _lumina_on, axes)
    assert all(all(alone) and all(together) for alone, together, _ in found), found
    assert len({traced for _, _, traced in found}) == 1


class Centred(Plain):
    """Subtracts the mean of all samples."""

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        x = super().run(x, e)
        return x - x.mean(0, keepdim=True)


def _batches(rank: int, size: int, method: str) -> list[bool]:
    """Whether batches have the bits of one rank: of equal samples, and then of others."""
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model, time = randomise(Centred()), torch.ones(2)
    alike, others = torch.randn(1, 5, WIDTH).repeat(2, 1, 1), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        plain = [model(x, time) for x in (alike, others)]
    shardit.parallelize(model, DiffusionParallelConfig(pipeline_parallel_size=2))
    return [torch.equal(model(x, time), expected) for x, expected in zip((alike, others), plain, strict=True)]


def test_equal_samples_do_not_show_that_a_batch_can_be_split() -> None:
    assert run_ranks(2, _batches) == [[True, True]] * 2


class FramesOfBranches(Plain):
    """Adds the first frame of its branch to each frame, as cross-frame attention does: samples of the same branch are
    related, of which a batch of two has one each."""

    def run(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        frames = super().run(x, e).unflatten(0, (min(2, len(x)), -1))
        return (frames + frames[:, :1]).flatten(0, 1)


def _frames(rank: int, size: int, method: str, axes: dict[str, int]) -> list[float]:
    """Distances of batches of two and of more samples from one rank."""
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model, batches = randomise(FramesOfBranches()), [torch.randn(n, 5, WIDTH) for n in (2, 4, 6, 4)]
    with torch.no_grad():
        plain = [model(x, torch.ones(len(x))) for x in batches]
    shardit.parallelize(model, DiffusionParallelConfig(**axes))
    made = [model(x, torch.ones(len(x))) for x in batches]
    return [float((a - b).norm() / b.norm()) for a, b in zip(made, plain, strict=True)]


@pytest.mark.parametrize("axes", [{"pipeline_parallel_size": 2}, {"cfg_parallel_size": 2}])
def test_batches_of_another_size_may_relate_samples(axes: dict[str, int]) -> None:
    for distances in run_ranks(2, _frames, axes):
        assert max(distances) < 1e-6, distances
