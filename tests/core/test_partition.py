"""Cuts, chunks, bounds and costs: pure functions, against brute force if possible."""

from __future__ import annotations

import itertools
import logging
import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shardit
from shardit.config import DiffusionParallelConfig
from shardit.core.modules.blocks import find_blocks
from shardit.core.placement.assignment import assign_blocks
from shardit.core.placement.partition import (
    MAX_CHUNKS,
    ChunkPlacement,
    automatic_chunks,
    balanced_cuts,
    block_cost,
    bound,
    place_blocks,
)
from shardit.errors import InputError, UnsupportedError
from tests.support.ranks import run_ranks


def all_cuts(count: int, parts: int) -> list[list[int]]:
    """Every way to cut `count` things into `parts` non-empty runs, as sizes."""
    places = [(0, *inner, count) for inner in itertools.combinations(range(1, count), parts - 1)]
    return [[b - a for a, b in itertools.pairwise(cut)] for cut in places]


def largest(costs: list[float], sizes: list[int]) -> float:
    ends = list(itertools.accumulate(sizes))
    return max(sum(costs[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def squares(costs: list[float], sizes: list[int]) -> float:
    ends = list(itertools.accumulate(sizes))
    return sum(sum(costs[end - size : end]) ** 2 for size, end in zip(sizes, ends, strict=True))


def test_large_ends_leave_the_others_even() -> None:
    assert balanced_cuts([50.0, *[1.0] * 8, 50.0], 4) == [1, 4, 4, 1]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_balanced_cuts_against_brute_force(data) -> None:
    costs = [float(c) for c in data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))]
    parts = data.draw(st.integers(1, len(costs)))
    sizes = balanced_cuts(costs, parts)
    assert len(sizes) == parts
    assert min(sizes) >= 1
    assert sum(sizes) == len(costs)
    cuts = all_cuts(len(costs), parts)
    best = min(largest(costs, cut) for cut in cuts)
    assert largest(costs, sizes) == best
    equals = [cut for cut in cuts if largest(costs, cut) == best]
    even = min(squares(costs, cut) for cut in equals)
    assert squares(costs, sizes) == even
    equals = [cut for cut in equals if squares(costs, cut) == even]
    assert sizes[-1] == min(cut[-1] for cut in equals)  # the last stage, which runs the epilogue, is the lightest


@pytest.mark.parametrize(("count", "parts", "expected"), [(5, 2, [3, 2]), (8, 3, [3, 3, 2]), (4, 4, [1, 1, 1, 1])])
def test_left_over_blocks_go_to_the_front(count: int, parts: int, expected: list[int]) -> None:
    assert balanced_cuts([1.0] * count, parts) == expected


def test_blocks_of_a_model_that_is_mostly_vocabulary():
    model = nn.Module()
    model.table, model.norms = nn.Embedding(9999, 8), nn.ModuleList([nn.LayerNorm(4)])
    model.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    assert [name for name, _ in find_blocks(model)] == ["layers.0", "layers.1"]


def test_fewer_blocks_than_parts() -> None:
    with pytest.raises(UnsupportedError, match="at most 3"):
        balanced_cuts([1.0] * 3, 4)
    with pytest.raises(UnsupportedError, match="use at most 3"):
        place_blocks([1.0] * 3, 4, 1)


def test_place_blocks() -> None:
    looped = place_blocks([1.0] * 8, 2, 2)
    assert looped == ChunkPlacement((2, 2, 2, 2), 2)
    assert looped.chunks == 2
    assert looped.owners() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert place_blocks([1.0] * 5, 2, 8).chunks == 2  # too few blocks for more
    assert place_blocks([1.0] * 5, 4, 8).chunks == 1
    assert place_blocks([1.0] * 4, 2, 1, [3, 1]).owners() == [0, 0, 0, 1]
    assert place_blocks([1.0] * 4, 2, 1, [1, 1, 1, 1]).owners() == [0, 1, 0, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 10))
def test_every_stage_gets_as_many_chunks(count: int, stages: int, chunks: int) -> None:
    if count < stages:
        return
    placement = place_blocks([1.0] * count, stages, chunks)
    assert len(placement.sizes) == placement.chunks * stages
    assert placement.chunks == min(chunks, count // stages)
    assert sum(placement.sizes) == len(placement.owners()) == count
    assert set(placement.owners()) == set(range(stages))


@pytest.mark.parametrize(
    ("blocks", "stages", "in_flight", "expected"),
    [(40, 2, 1, 1), (40, 1, 4, 1), (40, 2, 2, MAX_CHUNKS), (30, 4, 2, 7), (3, 2, 2, 1), (8, 8, 2, 1), (2, 3, 2, 1)],
)
def test_automatic_chunks(blocks: int, stages: int, in_flight: int, expected: int) -> None:
    assert automatic_chunks(blocks, stages, in_flight) == expected


def test_bound() -> None:
    assert bound(1, 4, 8) == 1
    assert bound(2, 2, 1) == pytest.approx(4 / 3)
    assert bound(2, 2, 8) == pytest.approx(32 / 17)
    assert bound(4, 2, 1) == pytest.approx(8 / 5)
    assert bound(8, 1, 3) == pytest.approx(1)
    for ranks, micro_batches in itertools.product(range(1, 9), range(1, 9)):
        values = [bound(micro_batches, ranks, chunks) for chunks in (1, 2, 4, 8, 1000)]
        assert values == sorted(values)
        assert values[-1] == pytest.approx(min(micro_batches, ranks), rel=0.01)


def with_parameters(**shapes: tuple[int, ...]) -> nn.Module:
    """A module with parameters of the given dotted names ("__" for a dot) and shapes."""
    root = nn.Module()
    for name, shape in shapes.items():
        *parents, leaf = name.split("__")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]  # type: ignore[assignment]
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root


def test_block_cost_of_double_and_single_blocks() -> None:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    with torch.device("meta"):
        double = FluxTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128)
        single = FluxSingleTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128)
    # FLUX.1 at 1024 x 1024: 4096 picture and 512 text tokens, matrix products only.
    square = 3072 * 3072
    truth_double = 4096 * 12 * square + 512 * 12 * square
    truth_single = (4096 + 512) * 12 * square
    ratio = block_cost(double) / block_cost(single)
    assert ratio == pytest.approx(truth_double / truth_single, rel=0.2)
    parameters = sum(p.numel() for p in double.parameters()) / sum(p.numel() for p in single.parameters())
    assert parameters > 2  # what a cut by size alone would go by


def test_block_cost_counts_matrices_by_their_tokens() -> None:
    full = block_cost(with_parameters(attn__to_q__weight=(8, 8)))
    assert full == 64
    assert block_cost(with_parameters(attn__to_q__weight=(8, 8), attn__to_q__bias=(8,), norm1__weight=(8,))) == full
    assert block_cost(with_parameters(attn__add_q_proj__weight=(8, 8))) == pytest.approx(full / 10)
    assert block_cost(with_parameters(norm1__linear__weight=(8, 8))) == pytest.approx(full / 10)
    assert block_cost(with_parameters(scale=(8,))) == 1.0
    assert block_cost(nn.Identity()) == 1.0


class Model(nn.Module):
    """Eight equal blocks."""

    def __init__(self, count: int = 8):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))


def placed(environ: dict[str, str], count: int = 8, **options) -> tuple[int, ...]:
    config = DiffusionParallelConfig(**{"pipeline_parallel_size": 2, **options})
    return assign_blocks(Model(count), config, 2, None, environ)[0].placement.sizes


def test_layer_partition_by_precedence() -> None:
    ours, theirs = {"SHARDIT_PP_LAYER_PARTITION": "3,5"}, {"VLLM_PP_LAYER_PARTITION": "2,6"}
    assert placed({**ours, **theirs}, layer_partition=[1, 7]) == (1, 7)
    assert placed({**ours, **theirs}) == (3, 5)
    assert placed(theirs) == (2, 6)
    assert placed({"SHARDIT_PP_LAYER_PARTITION": " ", **theirs}) == (2, 6)
    assert placed({"VLLM_PP_LAYER_PARTITION": "1,3,3,1"}, pipeline_chunks=2) == (1, 3, 3, 1)
    assert placed({}) == (1,) * 8
    assert placed({}, pipeline_chunks=1) == (4, 4)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("3,4", {}, "adds up to 7, but the transformer has 8 blocks"),
        ("3,4,1", {}, "has 3 entries"),
        ("4,4", {"pipeline_chunks": 2}, "needs 4"),
        ("4,x", {}, "'x' is not a number"),
        ("8,0", {}, "at least 1"),
    ],
)
def test_layer_partition_that_does_not_fit(text: str, options: dict, message: str) -> None:
    for variable in ("SHARDIT_PP_LAYER_PARTITION", "VLLM_PP_LAYER_PARTITION"):
        with pytest.raises(InputError, match=message) as caught:
            placed({variable: text}, **options)
        assert variable in str(caught.value)


def test_fewer_chunks_than_asked_for_are_noted() -> None:
    config = DiffusionParallelConfig(pipeline_parallel_size=2, pipeline_chunks=8)
    cut, note = assign_blocks(Model(5), config, 2, None, {})
    assert cut.placement.chunks == 2
    assert note == "Model: 2 chunks per rank instead of 8, since it has 5 blocks"
    assert assign_blocks(Model(16), config, 2, None, {})[1] is None


def warned(rank: int, count: int, method: str, alone: bool, **options: int) -> list[str]:
    """The messages when a model is loaded, or sharded by `parallelize`."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardit").addHandler(handler)
    config = DiffusionParallelConfig(pipeline_parallel_size=count, pipeline_chunks=100)
    if count > 1:
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    if alone:
        shardit.parallelize(Model(5), config)
    else:
        shardit.load("tiny/flux", config)
    return lines


@pytest.mark.parametrize("alone", [False, True])
def test_chunks_that_cannot_be_used_are_logged(alone: bool) -> None:
    first, second = run_ranks(2, warned, alone)
    assert len(first) == 1
    assert re.search(r": [26] chunks per rank instead of 100, since it has (5|12) blocks", first[0])
    assert second == []
    [[only]] = run_ranks(1, warned, alone)
    assert only.startswith("pipeline_chunks=100 changes nothing with pipeline_parallel_size=1: leave it out")


def test_chunks_of_one_stage() -> None:
    cut, note = assign_blocks(Model(5), DiffusionParallelConfig(pipeline_chunks=2), 2, None, {})
    assert cut.placement.chunks == 1
    assert "changes nothing" in str(note)
    assert assign_blocks(Model(5), DiffusionParallelConfig(pipeline_chunks=1), 2, None, {})[1] is None


def test_models_that_cannot_be_cut() -> None:
    config = DiffusionParallelConfig(pipeline_parallel_size=2)
    with pytest.raises(UnsupportedError, match="more than the 1 blocks"):
        assign_blocks(Model(1), config, 2, None, {})
    with pytest.raises(UnsupportedError, match="no block lists"):
        assign_blocks(nn.Linear(2, 2), config, 2, None, {})
