"""A compiled module that contains blocks of a staged list: it leaves its compiled code at their calls."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import shardit
from shardit.core.runtime.pending import materialize
from tests.diffusion.test_parallelize import join
from tests.parallel.test_tensor import distance
from tests.support.ranks import run_ranks
from tests.support.survey_models import Draw, entry

CALLS = (0, False), (3, True)


def refined(rank: int, size: int, method: str, config: dict[str, Any], early: bool) -> tuple[list[float], int]:
    """Call a model whose refiner is a repeated block, around blocks of a list of its own; return the distances to the
    plain model, and the number of compiled frames."""
    join(rank, size, method)
    found = entry("HunyuanVideoTransformer3DModel")
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


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("axis", ["pipeline_parallel_size", "ulysses_degree", "tensor_parallel_size"])
def test_a_compiled_module_around_blocks(axis: str, early: bool) -> None:
    for distances, frames in run_ranks(2, refined, {axis: 2}, early, timeout=200):
        assert max(distances) <= (0 if axis == "pipeline_parallel_size" else 1e-5)
        assert frames


def compiled_runs(rank: int, size: int, method: str) -> dict[str, tuple[list[int], set[str]]]:
    """Compile the blocks of a sharded model; return by axis how many compiled graphs each of three calls runs, and the
    files of this package that are in a graph."""
    join(rank, size, method)
    found = entry("WanTransformer3DModel")
    results = {}
    for axis in ("ulysses_degree", "tensor_parallel_size"):
        torch._dynamo.reset()
        model: Any = found.build()
        del model.blocks[1:]
        shardit.parallelize(model, timeout_s=60, **{axis: 2})
        ran, ours = [], set()

        def counted(graph: Any, inputs: Any) -> Any:
            traces = [node.stack_trace or "" for node in graph.graph.nodes]
            ours.update(file for trace in traces for file in re.findall(r"shardit/((?:core|parallel)/\S+\.py)", trace))  # noqa: B023

            def run(*args: Any) -> Any:
                ran[-1] += 1  # noqa: B023
                return graph.forward(*args)

            return run

        model.compile_repeated_blocks(backend=counted)
        for number in (0, 3, 4):
            ran.append(0)
            materialize(model(**found.inputs(Draw(number, False)), return_dict=False))
        results[axis] = ran, ours
    return results


def test_blocks_stay_compiled() -> None:
    """Trials of a first call would make torch.compile skip the code of blocks for good; collective operations are not
    compiled."""
    for results in run_ranks(2, compiled_runs):
        for axis, (ran, ours) in results.items():
            assert ran[1] == ran[2] > 0, (axis, ran)
            assert not any(file.startswith("core/comm/") for file in ours), (axis, ours)
