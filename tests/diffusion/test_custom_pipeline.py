"""Pipelines of users: the examples on every axis, with and without mixins; which bases the mixins want."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import shardit
from shardit import DiffusionParallelConfig, InputError
from shardit.core.comm import p2p as comm
from shardit.mixins import CFGParallelMixin, PipelineParallelMixin
from tests.diffusion.test_parallelize import join
from tests.support.paths import EXAMPLES
from tests.support.ranks import run_ranks

FOLDER = EXAMPLES / "custom_pipeline"
AXES: list[dict[str, int]] = [
    {"pipeline_parallel_size": 2},
    {"cfg_parallel_size": 2},
    {"tensor_parallel_size": 2},
    {"ulysses_degree": 2},
    {"ring_degree": 2},
]
TOKENS = ("ulysses_degree", "ring_degree")
EXACT = ("pipeline_parallel_size", "cfg_parallel_size", "data_parallel_size")


def example(name: str) -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def run_example(rank: int, count: int, method: str, name: str, axes: list[dict[str, int]]) -> None:
    join(rank, count, method)
    module = example(name)
    expected = module.Pipeline()("a red fox")
    for sizes in axes:
        pipe = module.Pipeline()
        assert shardit.parallelize(pipe, DiffusionParallelConfig(**sizes, split_batch=False)) is pipe
        for _ in range(2):
            out = pipe("a red fox")
            assert type(out) is torch.Tensor
            if set(sizes) <= set(EXACT):
                assert torch.equal(out, expected), sizes
            else:
                assert float((out - expected).norm() / expected.norm()) <= 1e-5, sizes
        tokens = getattr(pipe.transformer, "shardit_sequence", None)
        assert (tokens is not None and tokens.attention.sp.sent_bytes > 0) == bool({*TOKENS} & set(sizes)), sizes
        held = sum(p.numel() for p in pipe.transformer.parameters() if not p.is_meta)
        everything = sum(p.numel() for p in module.Pipeline().transformer.parameters())
        sharded = {"pipeline_parallel_size", "tensor_parallel_size"} & set(sizes)
        assert (held < 0.7 * everything) == bool(sharded), sizes


@pytest.mark.parametrize("name", ["custom_pipeline", "with_mixins"])
def test_examples_on_every_axis(name: str) -> None:
    run_ranks(2, run_example, name, AXES)


@pytest.mark.full
@pytest.mark.parametrize("name", ["custom_pipeline", "with_mixins"])
def test_examples_on_two_axes(name: str) -> None:
    pairs = [{"cfg_parallel_size": 2, "pipeline_parallel_size": 2}, {"ulysses_degree": 2, "pipeline_parallel_size": 2}]
    run_ranks(4, run_example, name, [*pairs, {"tensor_parallel_size": 2, "data_parallel_size": 2}])


def without_messages(rank: int, count: int, method: str) -> str:
    join(rank, count, method)
    pipe = example("with_mixins").Pipeline()
    shardit.parallelize(pipe, DiffusionParallelConfig(pipeline_parallel_size=2))
    pipe("a red fox")
    own = comm.Comm.send
    comm.Comm.send = lambda self, message, *a, **k: own(self, torch.zeros_like(message), *a, **k)
    with pytest.raises(InputError) as caught:
        pipe("a red fox")
    return str(caught.value)


def test_broken_messages_are_seen() -> None:
    for error in run_ranks(2, without_messages):
        assert error.startswith("ranks differ in the last step of Pipeline, though not in the first")


def sums(*command: str) -> list[float]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200, env=env, check=True)
    return [float(number) for number in re.findall(r"sum of the result: (-?\d+\.\d{4})", done.stdout)]


@pytest.mark.full
@pytest.mark.parametrize("name", ["custom_pipeline", "with_mixins"])
def test_examples_as_programs(name: str) -> None:
    file = str(FOLDER / f"{name}.py")
    (alone,) = sums(file)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", file)
    assert sums(*torchrun, "--pipeline-parallel-size=2") == [alone, alone]
    assert sums(*torchrun, "--ulysses_degree=2") == pytest.approx([alone, alone], rel=1e-3)


def test_bases() -> None:
    class Right(nn.Module, PipelineParallelMixin, CFGParallelMixin):
        pass

    class Below(Right):
        pass

    class GuidanceAlone(nn.Module, CFGParallelMixin):
        pass

    right = r"write class Wrong\(nn.Module, PipelineParallelMixin, CFGParallelMixin\)"
    for bases in [(nn.Module, CFGParallelMixin, PipelineParallelMixin), (nn.Module, PipelineParallelMixin)]:
        with pytest.raises(TypeError, match=right):
            type("Wrong", bases, {})
    assert issubclass(Below, CFGParallelMixin)
    assert issubclass(GuidanceAlone, CFGParallelMixin)


class Doubles:
    """A scheduler."""

    def step(self, noise: torch.Tensor, t: Any, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (latents + t * noise,)


def test_methods_on_one_rank() -> None:
    pipe = CFGParallelMixin()
    pipe.transformer, pipe.scheduler = lambda x: (2 * x,), Doubles()
    one, two = torch.ones(1, 3, 2), torch.full((1, 3, 2), 2.0)
    wanted, unwanted = {"x": two}, {"x": one}
    assert torch.equal(pipe.predict_noise(x=one), two)
    guided = pipe.predict_noise_maybe_with_cfg(True, 3.0, wanted, unwanted, False)
    assert torch.equal(guided, torch.full((1, 3, 2), 8.0))
    assert torch.allclose(pipe.predict_noise_maybe_with_cfg(True, 3.0, wanted, unwanted, True, 2), 2 * two[:, :2])
    assert torch.equal(pipe.predict_noise_maybe_with_cfg(False, 3.0, wanted), 2 * two)
    assert torch.equal(pipe.scheduler_step(one, 2.0, one), 3 * one)
    with pytest.raises(ValueError, match="negative_kwargs"):
        pipe.predict_noise_maybe_with_cfg(True, 3.0, wanted)
