"""Compiled modules of sharded models: those that contain blocks of a staged list leave their compiled code at the calls
of these; those that are blocks stay compiled."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import shardit
from shardit.core.runtime.pending import materialize
from shardit.parallel.attention.hook import intercept_attention
from shardit.parallel.attention.sequence_attention import Call
from tests.diffusion.test_parallelize import join
from tests.parallel.test_tensor import distance
from tests.support.brought import pipeline, run
from tests.support.ranks import run_ranks
from tests.support.survey_models import Draw, entry

pytestmark = pytest.mark.timeout(400)

CALLS = (0, False), (3, True)
AROUND = ("pipeline_parallel_size", "ulysses_degree", "tensor_parallel_size")
BROKEN = ("tensor_parallel_size",)
"""Axes whose messages break the graphs of blocks."""
LAYERS = 4


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


class Runs(NamedTuple):
    """made: compiled graphs. ran: how many of them each call ran. ours: files of this package in them. distances: of
    each call to the plain model."""

    made: int
    ran: list[int]
    ours: set[str]
    distances: list[float]


def compiled_runs(axis: str) -> Runs:
    """Call a sharded model with compiled blocks, between calls of a plain one with the same code."""
    torch._dynamo.reset()
    found = entry("WanTransformer3DModel")
    found = replace(found, config={**found.config, "num_layers": LAYERS})
    plain, model = found.build(), found.build()
    calls = [found.inputs(Draw(number, False)) for number in (0, 3, 4)]
    plain.compile_repeated_blocks(backend="eager", dynamic=False)
    with torch.no_grad():
        expected = [plain(**call, return_dict=False)[0] for call in calls]
    shardit.parallelize(model, timeout_s=60, **{axis: 2})
    runs, graphs = Runs(0, [], set(), []), []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        traces = [node.stack_trace or "" for node in graph.graph.nodes]
        runs.ours.update(file for text in traces for file in re.findall(r"shardit/((?:core|parallel)/\S+\.py)", text))

        def one(*args: Any) -> Any:
            runs.ran[-1] += 1
            return graph.forward(*args)

        return one

    model.compile_repeated_blocks(backend=counted, dynamic=False, fullgraph=axis not in BROKEN)
    for call, wanted in zip(calls, expected, strict=True):
        runs.ran.append(0)
        got = model(**call, return_dict=False)[0]
        materialize([got])
        runs.distances.append(distance(wanted, got))
    with torch.no_grad():
        assert torch.equal(plain(**calls[0], return_dict=False)[0], expected[0])
    return runs._replace(made=len(graphs))


class Noted:
    """Plain attention; notes the scale of each call."""

    def __init__(self) -> None:
        self.scales: list[float | None] = []

    def attend(self, call: Call) -> torch.Tensor:
        self.scales.append(call.scale)
        return call.inner(call.q, call.k, call.v, call.mask)


def attention_calls() -> list[float | None]:
    """Compile equal attention calls, the first of which has no reader; return the scales of those that happen."""

    def several(q: torch.Tensor) -> torch.Tensor:
        F.scaled_dot_product_attention(q, q, q, scale=2.0)
        return F.scaled_dot_product_attention(q, q, q, scale=3.0) + F.scaled_dot_product_attention(q, q, q, scale=2.0)

    compiled, noted, q = torch.compile(several, backend="aot_eager", fullgraph=True), Noted(), torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        expected = several(q)
        with intercept_attention(noted):
            assert torch.equal(compiled(q), expected)
            noted.scales.clear()
            assert torch.equal(compiled(q), expected)
        assert torch.equal(compiled(q), expected)  # no longer sent anywhere
    return noted.scales


def branches_in_flight() -> tuple[float, int]:
    """Call a pipeline with two branches of guidance and compiled blocks on Ring ranks, twice; return the distance to
    the plain one, and the number of model calls that were in flight together."""
    torch._dynamo.reset()
    guidance = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
    expected, pipe = run(pipeline("qwen-image"), "qwen-image", **guidance), pipeline("qwen-image")
    shardit.parallelize(pipe, ring_degree=2, timeout_s=60)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    made = [run(pipe, "qwen-image", **guidance) for _ in range(2)]
    return max(distance(expected, one) for one in made), pipe.transformer.shardit_overlap.overlapped


Found = tuple[dict[tuple[str, bool], tuple[list[float], int]], dict[str, Runs], list[float | None], tuple[float, int]]
"""Results of `refined` by axis and moment, of `compiled_runs` by axis, `attention_calls` and `branches_in_flight`."""


def on_ranks(rank: int, size: int, method: str) -> Found:
    join(rank, size, method)
    around = {(axis, early): refined({axis: 2}, early) for axis in AROUND for early in (True, False)}
    return around, {axis: compiled_runs(axis) for axis in AROUND}, attention_calls(), branches_in_flight()


@pytest.fixture(scope="module")
def by_rank() -> list[Found]:
    """Return the results of one group of ranks: the first use of a compiler takes longest."""
    return run_ranks(2, on_ranks, timeout=380)


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("axis", AROUND)
def test_a_compiled_module_around_blocks(axis: str, early: bool, by_rank: list[Found]) -> None:
    for around, *_ in by_rank:
        distances, frames = around[axis, early]
        assert max(distances) <= (0 if axis == "pipeline_parallel_size" else 1e-5)
        assert 0 < frames <= (60 if axis in BROKEN else 13)


@pytest.mark.parametrize("axis", AROUND)
def test_blocks_stay_compiled(axis: str, by_rank: list[Found]) -> None:
    """Trials of a first call would make torch.compile skip the code of blocks for good; collective operations are not
    compiled. Blocks of a class share one graph, as in the plain model."""
    for _, results, *_ in by_rank:
        found = results[axis]
        assert found.ran[1] == found.ran[2] > 0, found
        assert not any(file.startswith("core/comm/") for file in found.ours), found
        assert max(found.distances) <= (0 if axis == "pipeline_parallel_size" else 1e-5)
        if axis not in BROKEN:
            layers = LAYERS // 2 if axis == "pipeline_parallel_size" else LAYERS
            assert (found.made, found.ran[1]) == (1, layers)


def test_compiled_code_makes_all_attention_calls_in_order(by_rank: list[Found]) -> None:
    """Ranks exchange messages in each."""
    for _, _, scales, _ in by_rank:
        assert scales == [2.0, 3.0, 2.0]


def test_compiled_branches_in_flight(by_rank: list[Found]) -> None:
    """A compiled block that waits in an attention call does not let the other branch compute: frames of pybind11 would
    end in another order than the reverse, which aborts the process."""
    for *_, (apart, overlapped) in by_rank:
        assert apart <= 1e-5
        assert overlapped > 0
