"""Ranks started by torchrun: requests go from the first rank to all, outputs come back to it, and waits are bounded."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import pytest

from shardit import DiffusionParallelConfig
from shardit.core.comm.mesh import init_mesh
from shardit.engine.joined_ranks import JoinedRanks
from shardit.engine.process.messages import SessionSpec
from shardit.errors import RankError
from tests.support.ranks import run_ranks

TIMEOUT_S = 2.0


@dataclass
class Made:
    """An output."""

    text: str
    peak_bytes: Any = None


class FakeSession:
    """A rank of a replica each, which makes every second request."""

    info = None

    def __init__(self, spec: SessionSpec, *, rank: int, world_size: int, init_method: str):
        self.mesh = init_mesh(
            spec.config, device="cpu", timeout_s=spec.timeout_s, rank=rank, init_method=os.environ["METHOD"]
        )

    def generate(self, requests: list[str], on_progress: Any) -> dict[int, Made]:
        rank, count = self.mesh.rank, self.mesh.world_size
        return {index: Made(requests[index]) for index in range(rank, len(requests), count)}


def joined(rank: int, count: int, method: str) -> JoinedRanks:
    os.environ.update(METHOD=method, RANK=str(rank), WORLD_SIZE=str(count))
    config = DiffusionParallelConfig(data_parallel_size=count)
    ranks = JoinedRanks(SessionSpec("m", config, session=f"{__name__}:FakeSession", timeout_s=TIMEOUT_S))
    ranks.start()
    return ranks


def outputs(rank: int, count: int, method: str) -> list[Made]:
    texts = ["one", "two", "three"] if rank == 0 else []  # requests of the first rank count
    return joined(rank, count, method).generate(lambda: texts, lambda *_: None)  # type: ignore[return-value]


@pytest.mark.parametrize("count", [1, 2])
def test_outputs_of_all_ranks_are_on_the_first(count: int) -> None:
    first, *others = run_ranks(count, outputs)
    assert [one.text for one in first] == ["one", "two", "three"]
    assert all(len(one.peak_bytes) == count for one in first)
    assert others == [[]] * (count - 1)


def without(rank: int, count: int, method: str, absent: int) -> tuple[str, float]:
    ranks = joined(rank, count, method)
    start = time.monotonic()
    try:
        if rank == absent:
            time.sleep(4 * TIMEOUT_S)
        else:
            ranks.generate(lambda: ["one"], lambda *_: None)
    except RankError as error:
        return error.reason, time.monotonic() - start
    return "", 0.0


@pytest.mark.parametrize("absent", [0, 1])
def test_a_wait_for_an_absent_rank_is_bounded(absent: int) -> None:
    reason, seconds = run_ranks(2, without, absent)[1 - absent]
    assert reason.startswith("communication failed (")
    assert seconds < 3 * TIMEOUT_S
