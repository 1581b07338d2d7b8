"""Ranks that take requests one by one: the bits of plain diffusers regardless of concurrent requests, cancelling within
a step, and failures of a request."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from shardit.engine.process.messages import RequestFinished
from tests.support.live_ranks import LiveRanks, live_ranks
from tests.support.real_omni import by_diffusers, same

SIZES: dict[str, dict[str, Any]] = {
    "alone": {},
    "stages": {"pipeline_parallel_size": 2},
    "guidance": {"cfg_parallel_size": 2},
}
SMALL, WIDE = {"height": 64, "width": 64}, {"height": 64, "width": 96}


@pytest.fixture(scope="module", params=list(SIZES))
def ranks(request: Any) -> Iterator[LiveRanks]:
    with live_ranks("wan2.2-t2v", session="real_session:Session", **SIZES[request.param]) as started:
        yield started


def frames(left: list[RequestFinished]) -> Any:
    assert [one.error for one in left] == [None] * len(left)
    assert len({one.start for one in left}) == 1
    assert all(one.output is None for one in left[1:])
    return left[0].output.frames[0]


def test_requests_come_and_go(ranks: LiveRanks) -> None:
    ranks.begin(1, seed=1, **WIDE)
    ranks.wait(lambda: 1 in ranks.steps(1))
    ranks.begin(2, seed=2, prompt="a dog", **SMALL)
    ranks.begin(3, seed=3, num_inference_steps=60, **WIDE)
    ranks.wait(lambda: 2 in ranks.steps(3))
    ranks.cancel(3)
    (gone, *others) = ranks.ends(3)
    assert all(one.cancelled for one in (gone, *others))
    reached = max(ranks.steps(3))
    ranks.begin(4, seed=4, **WIDE)
    for key, prompt, size in ((1, "a cat", WIDE), (2, "a dog", SMALL), (4, "a cat", WIDE)):
        expected = by_diffusers("wan2.2-t2v", key, prompt=prompt, **size)
        assert same(expected, frames(ranks.ends(key))), key
    assert max(ranks.steps(3)) == reached < 50


def test_a_request_that_comes_while_all_slots_are_taken(ranks: LiveRanks) -> None:
    for key in (41, 42, 43):
        ranks.begin(key, seed=key, num_inference_steps=30, **SMALL)
    for key in (44, 45, 46):
        ranks.begin(key, seed=key, **SMALL)
    ranks.cancel(45)  # it waits
    ranks.wait(lambda: all(5 in ranks.steps(key) for key in (41, 42, 43)))
    assert ranks.steps(44) == []
    assert all(one.cancelled and one.start is None for one in ranks.ends(45))
    ranks.cancel(42)
    ranks.ends(42)
    for key in (44, 46):
        assert same(by_diffusers("wan2.2-t2v", key, prompt="a cat", **SMALL), frames(ranks.ends(key))), key
    ends = [m.key for rank, m in ranks.said if isinstance(m, RequestFinished) and rank == 0 and m.key > 40]
    assert ends[:3] == [45, 42, 44]
    for key in (41, 43):
        expected = by_diffusers("wan2.2-t2v", key, prompt="a cat", num_inference_steps=30, **SMALL)
        assert same(expected, frames(ranks.ends(key))), key


def test_a_cancelled_request_ends_with_the_step_that_it_is_in(ranks: LiveRanks) -> None:
    naps = " ".join(f"nap:0:{step}" for step in range(3, 8))  # rank 0 sleeps before it goes on with the next step
    for key, beside in ((31, False), (32, True)):
        if beside:
            ranks.begin(33, seed=1, num_inference_steps=30)
        ranks.begin(key, seed=3, prompt=f"a cat {naps}", num_inference_steps=60)
        ranks.wait(lambda key=key: 3 in ranks.steps(key))
        ranks.cancel(key)
        assert all(one.cancelled for one in ranks.ends(key))
        assert max(ranks.steps(key)) <= 4
    ranks.cancel(33)
    ranks.ends(33)


def test_a_request_that_fails_ends_alone(ranks: LiveRanks) -> None:
    ranks.begin(11, seed=1)
    ranks.begin(12, seed=2, prompt_embeds=torch.zeros(1))
    errors = [left.error for left in ranks.ends(12)]
    assert all("Cannot forward both `prompt`" in str(error) for error in errors)
    assert same(by_diffusers("wan2.2-t2v", 1, prompt="a cat"), frames(ranks.ends(11)))


def test_cancelled_before_it_begins_and_after_it_ended(ranks: LiveRanks) -> None:
    ranks.cancel(99)  # never existed
    ranks.begin(21, seed=1)
    ranks.cancel(21)
    assert all(left.cancelled for left in ranks.ends(21))
    ranks.cancel(21)
    ranks.begin(22, seed=5)
    assert same(by_diffusers("wan2.2-t2v", 5, prompt="a cat"), frames(ranks.ends(22)))


@pytest.mark.full
def test_a_killed_rank_and_a_new_start() -> None:
    with live_ranks("flux", pipeline_parallel_size=2) as ranks:
        ranks.begin(1, seed=1, num_inference_steps=200)
        ranks.wait(lambda: 2 in ranks.steps(1))
        fork_server = ranks.rank_group.placement.fork_server  # pyright: ignore
        assert fork_server is not None
        os.kill(fork_server.pids[1], signal.SIGKILL)
        ranks.wait(lambda: bool(ranks.downs))
        assert "SIGKILL" in ranks.downs[0].reason
        ranks.downs.clear()
        ranks.said.clear()
        ranks.start()
        ranks.begin(1, seed=1)
        (expected,) = by_diffusers("flux", 1, prompt="a cat")
        assert same([expected], ranks.ends(1)[0].output.images)


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 2},
        {"ulysses_degree": 2},
        pytest.param({"ring_degree": 2}, marks=pytest.mark.full),
        pytest.param({"vae_patch_parallel_size": 2, "pipeline_parallel_size": 2}, marks=pytest.mark.full),
        pytest.param({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, marks=pytest.mark.full),
        pytest.param({"ulysses_degree": 2, "cfg_parallel_size": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_requests_come_and_go_on_other_axes(sizes: dict[str, int]) -> None:
    with live_ranks("wan2.2-t2v", **sizes) as ranks:
        ranks.begin(1, seed=1, num_inference_steps=20, **WIDE)
        ranks.wait(lambda: 1 in ranks.steps(1))
        ranks.begin(2, seed=2, prompt="a dog", **SMALL)
        ranks.begin(3, seed=3, num_inference_steps=200, **WIDE)
        ranks.wait(lambda: 2 in ranks.steps(3))
        ranks.cancel(3)
        assert all(one.cancelled for one in ranks.ends(3))
        expected = {
            1: by_diffusers("wan2.2-t2v", 1, prompt="a cat", num_inference_steps=20, **WIDE),
            2: by_diffusers("wan2.2-t2v", 2, prompt="a dog", **SMALL),
        }
        for key, wanted in expected.items():
            for ours, theirs in zip(frames(ranks.ends(key)), wanted, strict=True):
                assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1, key
