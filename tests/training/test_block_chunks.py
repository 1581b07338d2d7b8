"""Where the blocks of a trained model go: by time, or by memory where most weights are frozen; too few blocks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from shardit import UnsupportedError, training
from shardit.config import DiffusionParallelConfig
from shardit.training.block_chunks import Placing, placing
from tests.support.ranks import run_ranks
from tests.training.cases import Odd, odd
from tests.training.runs import join, one_step


class Pair(nn.Module):
    """A block with weights for an image and for a text, of which the latter take little time."""

    def __init__(self, text: int):
        super().__init__()
        self.image = nn.Linear(8, 8, bias=False)
        self.text = nn.Linear(8, text, bias=False)
        self.lora = nn.Linear(8, 1, bias=False)


def sizes(found: Placing) -> list[int]:
    chunks = found(range(len(found.costs)))
    return [chunks.count(chunk) for chunk in sorted(set(chunks))]


def test_frozen_blocks_are_placed_by_memory() -> None:
    """Two large blocks, six small ones: they take about as long each, but not as much memory."""
    blocks: list[nn.Module] = [Pair(32), Pair(32), *(Pair(1) for _ in range(6))]
    config = DiffusionParallelConfig(pipeline_parallel_size=2)
    assert sizes(placing(nn.Module(), blocks, config, "1f1b")) == [4, 4]
    for block in blocks:
        block.requires_grad_(False)
        block.lora.requires_grad_(True)  # pyright: ignore
    assert sizes(placing(nn.Module(), blocks, config, "1f1b")) == [2, 6]
    chosen = DiffusionParallelConfig(pipeline_parallel_size=2, layer_partition=(3, 5))
    assert sizes(placing(nn.Module(), blocks, chosen, "1f1b")) == [3, 5]


def test_blocks_are_placed_in_the_order_in_which_they_run() -> None:
    found = Placing([1.0, 9.0, 1.0, 9.0], 2, 1)
    assert found([0, 1, 2, 3]) == [0, 0, 1, 1]
    assert found([3, 0, 2, 1]) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("stages", "schedule", "chunks", "note"),
    [
        (4, "interleaved", None, "it runs as 1f1b"),
        (2, "interleaved-zb", 3, "it runs with 2 chunks"),
        (2, "interleaved", None, None),
        (2, "zbv", None, None),
        (4, "1f1b", None, None),
    ],
)
def test_fewer_chunks_are_noted(stages: int, schedule: str, chunks: int | None, note: str | None) -> None:
    config = DiffusionParallelConfig(pipeline_parallel_size=stages, pipeline_chunks=chunks)
    found = placing(Odd("plain"), list(Odd("plain").blocks), config, schedule)
    if note is None:
        assert found.note is None
    else:
        wanted = chunks or 2
        assert found.note == (
            f"schedule={schedule!r} has {wanted} chunks on each of {stages} stages, so it needs {wanted * stages} "
            f"blocks, and Odd has 4: {note}"
        )


def test_zbv_with_too_few_blocks_is_refused() -> None:
    config = DiffusionParallelConfig(pipeline_parallel_size=4)
    with pytest.raises(UnsupportedError) as raised:
        placing(Odd("plain"), list(Odd("plain").blocks), config, "zbv")
    assert str(raised.value) == (
        "schedule='zbv' has 2 chunks on each of 4 stages, so it needs 8 blocks, and Odd has 4: use schedule='1f1b', or "
        "pipeline_parallel_size=2"
    )


def noted(rank: int, size: int, method: str) -> tuple[list[str], float]:
    """What the ranks log where an interleaved schedule has too few blocks, and whether it is right."""
    join(rank, size, method)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardit").addHandler(handler)
    torch.manual_seed(0)
    found: dict[str, Any] = one_step(odd("plain"), 4, {"pipeline_parallel_size": size, "schedule": "interleaved"})
    with pytest.raises(UnsupportedError, match="so it needs 6 blocks, and Odd has 4"):
        training.stages(Odd("plain"), lambda *_: torch.zeros(()), pipeline_parallel_size=size, schedule="zbv")
    return lines, found["worst"]


def test_the_first_rank_logs_the_note() -> None:
    of_ranks = run_ranks(3, noted, timeout=60)
    assert [len(lines) for lines, _ in of_ranks] == [1, 0, 0]
    assert of_ranks[0][0][0].endswith("and Odd has 4: it runs as 1f1b")
    assert max(worst for _, worst in of_ranks) < 2e-6
