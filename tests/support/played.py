"""A dispatcher whose ranks, writers and log are played by the test."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.output.output import Output
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.engine.process.channel import Channel
from shardit.engine.process.failure import Failure, Timeouts
from shardit.engine.process.loop import Loop
from shardit.engine.process.messages import Cancel, Progress, RequestFinished
from shardit.server.jobs.job import Job, NewJob
from shardit.server.jobs.store import Store
from shardit.server.options import ServeOptions
from shardit.server.supervisor.dispatch import Dispatcher
from shardit.server.supervisor.metrics import SupervisorMetrics

SIGNATURE = PipelineSignature("FakePipeline", ("prompt", "image", "height", "width", "num_inference_steps"))
INFO = ModelInfo(SIGNATURE, held_bytes=1)


class FakePipe(Channel):
    """Records the messages that a rank would read."""

    def __init__(self, rank: int, sent: list[tuple[int, Any]]):
        self.rank, self.sent, self.left = rank, sent, b""

    def send_encoded(self, parts: Sequence[Any]) -> None:
        self.left = b"".join(parts)
        self.sent.append((self.rank, self.recv()))

    def _read(self, length: int) -> bytearray:
        data, self.left = self.left[:length], self.left[length:]
        return bytearray(data)


class FakeRankGroup:
    """Plays the part of `RankGroup`: nothing runs, and the test sends the messages of ranks."""

    def __init__(self, size: int, on_down: Callable[[Failure], None]):
        self.size, self.on_down = size, on_down
        self.failing = False
        self.timeouts = Timeouts(probe_s=0.0)
        self.explain: Any = None
        self.sent: list[tuple[int, Any]] = []
        self.failures: list[str] = []
        self.stacks: dict[int, str] = {}
        self.reads = 0

    def pipes(self, ranks: Iterable[int]) -> list[Any]:
        return [FakePipe(rank, self.sent) for rank in ranks]

    def fail(self, reason: str, rank: int = -1) -> None:
        failure = Failure(reason, rank=rank)
        self.failures.append(failure.text)
        self.on_down(failure)

    def hang(self, reason: str, silent: Iterable[int]) -> None:
        self.fail(reason)

    def read_stacks(self, seen: Callable[[dict[int, str]], None]) -> None:
        self.reads += 1
        seen(self.stacks)


class ManualWriter(Executor):
    """Writes when the test asks for it."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Any, tuple[Any, ...]]] = []

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.work.append((future, fn, args))
        return future

    def write(self) -> None:
        """Do all that was handed over."""
        todo, self.work = self.work, []
        for future, fn, args in todo:
            try:
                future.set_result(fn(*args))
            except Exception as error:
                future.set_exception(error)


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    warning = error = info

    def ends(self) -> list[tuple[str, str]]:
        return [(fields["request_id"], fields["state"]) for event, fields in self.lines if event == "job_ended"]


@dataclass
class Server:
    """A dispatcher, and ranks that answer on request."""

    store: Store
    jobs: Dispatcher
    rank_group: FakeRankGroup
    writer: ManualWriter
    log: Log
    told: list[Any]
    loop: Loop
    together: int
    count: int = 0
    all: list[str] = field(default_factory=list)

    def put(self, cost: float = 1.0, inputs: dict[str, bytes] | None = None, **request: Any) -> str:
        new = NewJob("image", {"prompt": "a cat", "height": 8, "width": 8, **request}, 1, cost, inputs or {})
        job_id = self.store.accept(new, queue_size=1000)[0].id
        self.all.append(job_id)
        self.jobs.wake()
        return job_id

    def running(self) -> list[str]:
        return [one.job.id for one in self.jobs.running.values()]

    def job(self, job_id: str) -> Job:
        found = self.store.get(job_id)
        assert found is not None
        return found

    def state(self, job_id: str) -> str:
        return self.job(job_id).state

    def key(self, job_id: str) -> int:
        return next(key for key, one in self.jobs.running.items() if one.job.id == job_id)

    def ranks(self, job_id: str) -> range:
        replica = self.jobs.running[self.key(job_id)].replica
        return range(replica * self.together, (replica + 1) * self.together)

    def step(self, job_id: str, step: int = 1, total: int = 4) -> None:
        self.jobs.on_rank_message(self.ranks(job_id)[0], Progress(self.key(job_id), step, total))

    def leave(self, job_id: str, *, made: Output | None = None, **more: Any) -> None:
        """All its ranks are through with a job, which `made` this."""
        key, ranks = self.key(job_id), self.ranks(job_id)
        for rank in ranks:
            good = rank == ranks[0] and not more
            output = (made or Output("a cat", 1, [Image.new("RGB", (8, 8))])) if good else None
            self.jobs.on_rank_message(
                rank, RequestFinished(key, None if more.get("cancelled") else "sum", output=output, **more)
            )

    def complete(self, job_id: str) -> None:
        self.leave(job_id)
        self.write()

    def write(self) -> None:
        self.writer.write()
        while self.loop._queue.qsize():
            self.loop.step(0.0)

    def until(self, condition: Callable[[], Any]) -> None:
        """Run the loop until something holds, which other threads bring about."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "nothing happens"
            self.loop.step(0.05)

    def die(self, reason: str = "rank 1 has ended") -> None:
        """The ranks die and come back."""
        self.jobs.down(Failure(reason))
        assert not self.jobs.running
        self.jobs.ready([INFO] * self.rank_group.size)

    def cancels(self) -> set[int]:
        return {message.key for _, message in self.rank_group.sent if isinstance(message, Cancel)}

    def finish_all(self) -> None:
        for _ in range(200):
            for job_id in self.running():
                self.complete(job_id)
            if not self.jobs.running:
                return


@contextlib.contextmanager
def played_server(folder: Path, **sizes: int) -> Iterator[Server]:
    """A dispatcher with two slots per replica whose ranks are up. No job ends twice."""
    config = DiffusionParallelConfig(**sizes)
    options = ServeOptions("x", folder, config)
    store, loop = Store(folder), Loop(lambda: None)
    rank_group = FakeRankGroup(config.world_size, on_down=lambda down: jobs.down(down))
    writer, log, told = ManualWriter(), Log(), []
    jobs = Dispatcher(options, store, rank_group, loop, writer, told.append, log, SupervisorMetrics())  # type: ignore[arg-type]
    jobs.slots = 2
    jobs.ready([INFO] * rank_group.size)
    yield Server(store, jobs, rank_group, writer, log, told, loop, rank_group.size // config.data_parallel_size)
    ends = log.ends()
    assert len({job_id for job_id, _ in ends}) == len(ends), "two ends"
    store.close()


def broken(*_: Any, **__: Any) -> Any:
    """Instead of a method of the store."""
    raise sqlite3.OperationalError("database or disk is full")
