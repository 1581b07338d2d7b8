"""The rank group with ranks played by sockets: reports of hanging ranks, without blocking."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.engine.process.channel import Channel
from shardit.engine.process.failure import Failure, Timeouts
from shardit.engine.process.loop import Loop
from shardit.engine.process.messages import Ready, SessionSpec
from shardit.engine.process.rank_group import RankGroup

STACK = 'Thread 0x1 (most recent call first):\n  File "x.py", line 1 in wait\n  File "y.py", line 2 in run\n'


class Played:
    """Two ranks, and the reports of the rank group. `stacks` is the answer of the placement, once `answer` is set."""

    def __init__(self) -> None:
        self.stacks_now: Any = {0: STACK, 1: ""}
        self.answer = threading.Event()
        self.ends: list[Channel] = []
        self.ups: list[Any] = []
        self.downs: list[Failure] = []
        self.loop = Loop(lambda: None)
        spec = SessionSpec("x", DiffusionParallelConfig(pipeline_parallel_size=2), of_server=True)
        self.rank_group = RankGroup(
            spec,
            self,
            self.loop,
            on_up=self.ups.append,
            on_down=self.downs.append,
            on_message=lambda *_: None,
            timeouts=Timeouts(closed_s=0.2),
        )

    def start(self, spec: SessionSpec, report: Any) -> list[Channel]:
        pairs = [socket.socketpair() for _ in range(2)]
        self.ends = [Channel(theirs) for _, theirs in pairs]
        return [Channel(ours) for ours, _ in pairs]

    def kill(self, grace_s: float = 0.0) -> None:
        pass

    def stop(self, code: int = 0) -> None:
        pass

    def stacks(self) -> dict[int, str]:
        assert self.answer.wait(60)
        if isinstance(self.stacks_now, Exception):
            raise self.stacks_now
        return self.stacks_now

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "nothing happens"
            self.loop.step(0.05)

    def run_briefly(self) -> None:
        """Run the loop for half a second, in which nothing more may happen."""
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            self.loop.step(0.05)


@pytest.fixture
def played() -> Any:
    one = Played()
    one.rank_group.bring_up()
    one.until(lambda: one.rank_group._pipes)
    for end in one.ends:
        end.send(Ready(ModelInfo(PipelineSignature("FakePipeline", ("prompt",)))))
    one.until(lambda: one.ups)
    yield one
    one.answer.set()
    one.rank_group.stop()


def test_hang_report_has_stacks_and_does_not_block(played: Played) -> None:
    played.rank_group.hang("no progress for 12 s", [0, 1])
    assert played.rank_group.failing
    assert played.downs == []  # the answer takes its time, the loop goes on
    played.answer.set()
    played.until(lambda: played.downs)
    (down,) = played.downs
    assert down.reason == 'no progress for 12 s; rank 0: File "x.py", line 1 in wait; rank 1: it does not react'


@pytest.mark.parametrize("stacks", [{}, OSError("the fork server is gone"), ValueError("half a message")])
def test_hang_without_readable_stacks(played: Played, stacks: Any) -> None:
    played.stacks_now = stacks
    played.answer.set()
    played.rank_group.hang("no progress for 12 s", [0, 1])
    played.until(lambda: played.downs)
    assert [down.reason for down in played.downs] == ["no progress for 12 s"]


def test_rank_that_exits_during_a_hang_is_reported_once(played: Played) -> None:
    played.rank_group.hang("no progress for 12 s", [0, 1])
    played.ends[1].close()
    played.run_briefly()
    played.answer.set()
    played.until(lambda: played.downs)
    played.run_briefly()
    assert [down.reason[:20] for down in played.downs] == ["no progress for 12 s"]


def test_stacks_of_exited_ranks_are_not_reported(played: Played) -> None:
    seen: list[Any] = []
    played.rank_group.read_stacks(seen.append)
    played.ends[1].close()
    played.until(lambda: played.downs)
    assert played.downs[0].text == "rank 1 failed: its connection has closed"
    played.answer.set()
    played.run_briefly()
    assert seen == []
