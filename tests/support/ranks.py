"""Run a function on several ranks, each a process of its own, talking over gloo."""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "tests.support.preload"])


class RanksFailed(AssertionError):
    """The errors of the ranks."""


def run_ranks(count: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Run function(rank, count, init_method, *args) on every rank and return the list of results. All processes are
    gone when this returns; every rank's traceback is in the error."""
    with tempfile.TemporaryDirectory() as folder:
        method = f"file://{folder}/store"
        workers = []
        for rank in range(count):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main, args=(theirs, function, rank, count, method, args), daemon=True
            )
            process.start()
            theirs.close()
            workers.append((process, ours))
        results, errors = _collect(workers, time.monotonic() + timeout)
        for process, _ in workers:
            process.kill()
            process.join()
    if errors:
        raise RanksFailed("\n".join(errors))
    return results


def _collect(workers: list[tuple[Any, Connection]], deadline: float) -> tuple[list[Any], list[str]]:
    results: list[Any] = [None] * len(workers)
    errors = []
    for rank, (_, connection) in enumerate(workers):
        # After a first failure the others only get a moment: they wait for the one that is gone.
        left = 5.0 if errors else max(0.1, deadline - time.monotonic())
        try:
            if not connection.poll(left):
                errors.append(f"rank {rank}: no answer in time")
                continue
            ok, payload = connection.recv()
        except EOFError:
            errors.append(f"rank {rank}: died")
            continue
        if ok:
            results[rank] = _load(payload)
        else:
            errors.append(f"rank {rank}: {payload}")
    return results, errors


def _rank_main(
    connection: Connection, function: Callable[..., Any], rank: int, count: int, method: str, args: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        connection.send((True, _dump(function(rank, count, method, *args))))
        time.sleep(2.0)  # a peer may still have to read its last message; when all are done, this process is killed
    except BaseException:
        connection.send((False, traceback.format_exc()))
    connection.close()
    os._exit(0)


def _dump(value: Any) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _load(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)
