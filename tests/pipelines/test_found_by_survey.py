"""Pipelines on which the survey has found a fault that no other test sees."""

from __future__ import annotations

import torch
from torch import nn

from shardit.core.modules.blocks import blocks_named, find_blocks
from tests.pipelines.measure import measure


def test_heads_of_one_rank_and_blocks_of_two_components() -> None:
    """Of Gemma 2 with one head for keys one rank has all and the other none. The ControlNet of Z-Image calls blocks of
    the transformer, which every rank has whole."""
    found = measure([("ZImageControlNetPipeline", "pp 2"), ("SanaPipeline", "tp 2")], timeout=200)
    assert [(one.name, one.kind) for one in found] == [
        ("ZImageControlNetPipeline", "right"),
        ("SanaPipeline", "right"),
    ], found


def test_lists_of_operations_are_no_blocks() -> None:
    """The feed-forward of Wan Animate's image encoder is one unit of tensor ranks, with a list in it."""
    found = measure([("WanAnimatePipeline", "tp 2 x pp 2")], timeout=200)
    assert [one.kind for one in found] == ["right"], found
    layer = nn.Sequential(nn.ModuleList([nn.Linear(8, 8), nn.Dropout()]), nn.ModuleList([nn.Linear(8, 8)]))
    assert [name for name, _ in find_blocks(layer)] == ["1.0"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(100, 100)
        self.blocks = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.more = nn.ModuleList([nn.Linear(15, 14)])


def test_blocks_of_a_whole_model_are_those_of_its_slices() -> None:
    """Slices of blocks have a smaller share of the parameters, below that of block lists."""
    model = Model()
    names = [name for name, _ in find_blocks(model)]
    assert names == ["blocks.0", "blocks.1", "more.0"]
    for block in model.blocks:
        block.weight = nn.Parameter(torch.zeros(4, 8))  # type: ignore[assignment]
    found = [("blocks.0", model.blocks[0]), ("blocks.1", model.blocks[1]), ("more.0", model.more[0])]
    assert find_blocks(model) == found[2:]
    assert blocks_named(model, names) == found
    assert blocks_named(model, ()) == found[2:]
