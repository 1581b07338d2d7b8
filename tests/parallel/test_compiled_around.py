"""Compiled modules of sharded models: those that contain blocks of a staged list leave their compiled code at the calls
of these; those that are blocks stay compiled."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import shardit
from shardit.core.runtime.pending import materialize
from tests.diffusion.test_parallelize import join
from tests.parallel.test_tensor import distance
from tests.support.ranks import run_ranks
from tests.support.survey_models import Draw, entry

pytestmark = pytest.mark.timeout(400)

CALLS = (0, False), (3, True)
AROUND = ("pipeline_parallel_size", "ulysses_degree", "tensor_parallel_size")


def refined(config: dict[str, Any], early: bool) -> tuple[list[float], int]:
    """Call a model whose refiner is a repeated block, around blocks of a list of its own; return the distances to the
    plain model, and the number of compiled frames."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = entry("HunyuanVideoTransformer3DModel")
    found = replace(found, config={**found.config, "num_layers": 2, "num_single_layers": 2})
    model: Any = found.build()
    with torch.no_grad():
        plain = [model(**found.inputs(Draw(*call)), return_dict=False)[0] for call in CALLS]
    if early:
        model.compile_repeated_blocks(backend="eager")
    shardit.parallelize(model, timeout_s=60, **config)
    if not early:
        model.compile_repeated_blocks(backend="eager")
    got = [model(**found.inputs(Draw(*call)), return_dict=False)[0] for call in CALLS]
    materialize(got)
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    return [distance(a, b) for a, b in zip(plain, got, strict=True)], frames


def compiled_runs(axis: str) -> tuple[list[int], set[str]]:
    """Compile the blocks of a sharded model; return how many compiled graphs each of three calls runs, and the files of
    this package that are in a graph."""
    torch._dynamo.reset()
    found = entry("WanTransformer3DModel")
    model: Any = found.build()
    del model.blocks[1:]
    shardit.parallelize(model, timeout_s=60, **{axis: 2})
    ran, ours = [], set()

    def counted(graph: Any, inputs: Any) -> Any:
        traces = [node.stack_trace or "" for node in graph.graph.nodes]
        ours.update(file for trace in traces for file in re.findall(r"shardit/((?:core|parallel)/\S+\.py)", trace))

        def run(*args: Any) -> Any:
            ran[-1] += 1
            return graph.forward(*args)

        return run

    model.compile_repeated_blocks(backend=counted)
    for number in (0, 3, 4):
        ran.append(0)
        materialize(model(**found.inputs(Draw(number, False)), return_dict=False))
    return ran, ours


Found = tuple[dict[tuple[str, bool], tuple[list[float], int]], dict[str, tuple[list[int], set[str]]]]
"""Results of `refined` by axis and moment, and of `compiled_runs` by axis."""


def on_ranks(rank: int, size: int, method: str) -> Found:
    join(rank, size, method)
    around = {(axis, early): refined({axis: 2}, early) for axis in AROUND for early in (True, False)}
    return around, {axis: compiled_runs(axis) for axis in AROUND[1:]}


@pytest.fixture(scope="module")
def by_rank() -> list[Found]:
    """Return the results of one group of ranks: the first use of a compiler takes longest."""
    return run_ranks(2, on_ranks, timeout=380)


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("axis", AROUND)
def test_a_compiled_module_around_blocks(axis: str, early: bool, by_rank: list[Found]) -> None:
    for around, _ in by_rank:
        distances, frames = around[axis, early]
        assert max(distances) <= (0 if axis == "pipeline_parallel_size" else 1e-5)
        assert frames


def test_blocks_stay_compiled(by_rank: list[Found]) -> None:
    """Trials of a first call would make torch.compile skip the code of blocks for good; collective operations are not
    compiled."""
    for _, results in by_rank:
        for axis, (ran, ours) in results.items():
            assert ran[1] == ran[2] > 0, (axis, ran)
            assert not any(file.startswith("core/comm/") for file in ours), (axis, ours)
