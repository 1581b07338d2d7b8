"""Rank processes that obey one command at a time; all are gone when the `with` block ends."""

from __future__ import annotations

import multiprocessing as mp
import tempfile
import traceback
from typing import Any

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["bench.preload"])


class RankFailed(RuntimeError):
    """A rank's traceback, or that it died."""


class Ranks:
    """`count` processes, each with a `Worker`. Between commands they are blocked in a read and cost nothing."""

    def __init__(self, count: int):
        self._folder = tempfile.TemporaryDirectory()
        self._workers: list[tuple[Any, Any]] = []
        method = f"file://{self._folder.name}/store"
        for rank in range(count):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_main, args=(theirs, rank, count, method), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def call(self, command: str, *args: Any, on: tuple[int, ...] | None = None) -> list[Any]:
        """Run a method of `Worker` on the given ranks (all of them) at once; their results in order."""
        chosen = [self._workers[rank] for rank in (on if on is not None else range(len(self._workers)))]
        for _, connection in chosen:
            connection.send((command, args))
        results = []
        for _, connection in chosen:
            try:
                ok, value = connection.recv()
            except EOFError:
                raise RankFailed(f"a rank died in {command}") from None
            if not ok:
                raise RankFailed(value)
            results.append(value)
        return results

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for _, connection in self._workers:
            connection.close()  # a rank that is not in the middle of a command ends by itself
        for process, _ in self._workers:
            process.join(2)
            process.kill()
            process.join()
        self._folder.cleanup()


def _main(connection: Any, rank: int, count: int, method: str) -> None:
    from bench.worker import Worker

    worker = Worker(rank, count, method)
    while True:
        try:
            command, args = connection.recv()
        except EOFError:  # the bench is gone
            return
        try:
            answer = (True, getattr(worker, command)(*args))
        except BaseException:
            answer = (False, f"rank {rank}: {traceback.format_exc()}")
        connection.send(answer)
