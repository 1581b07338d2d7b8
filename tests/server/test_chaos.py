"""Forty accepted jobs and twenty kills of any process at any moment: no job is lost or ends twice, and completed ones
have the bits of plain diffusers."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from shardit.server.jobs.store import Store
from tests.support.real_server import RealServer, real_server

JOBS, KILLS, CANCELLED, LATE = 40, 20, 5, 10
CALLS = [
    {"width": width, "height": height, "num_inference_steps": steps}
    for width, height, steps in ((160, 128, 12), (96, 96, 30), (128, 64, 45), (64, 160, 20), (192, 128, 8))
]


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_kills_at_random(tmp_path: Path) -> None:
    chance = random.Random(20)
    with real_server("flux", tmp_path / "data", "--pipeline-parallel-size", "2") as server:
        asked = [(seed % 4, CALLS[seed % len(CALLS)]) for seed in range(JOBS)]
        ids = [submit(server, number, asked) for number in range(JOBS - LATE)]
        hit: dict[str, int] = {}
        for number in range(KILLS):
            what = chance.choice(("supervisor", "api", "fork_server", "rank 0", "rank 1"))
            server.wait(lambda what=what: what in server.pids(), what)
            time.sleep(chance.choice((0.1, 1.0, 6.0)) * chance.random())
            while not kill(server, what):
                pass
            hit[what] = hit.get(what, 0) + 1
            if number % (KILLS // LATE) == 0 and len(ids) < JOBS:
                ids.append(submit(server, len(ids), asked))
            if number % (KILLS // CANCELLED) == 1:
                server.patiently("POST", f"{server.path}/{chance.choice(ids)}/cancel")
        ids += [submit(server, number, asked) for number in range(len(ids), JOBS)]
        assert len(set(ids)) == JOBS
        assert sum(hit.values()) == KILLS
        assert len(hit) == 5, hit
        states: dict[str, int] = {}
        for job_id, (seed, call) in zip(ids, asked, strict=True):
            shown = server.ended(job_id)
            states[shown["status"]] = states.get(shown["status"], 0) + 1
            if shown["status"] == "completed":
                server.check(job_id, seed, **call)
        assert states.get("failed", 0) == 0, states
        assert states.get("cancelled", 0) <= CANCELLED
        assert server.stop() == 0
        check_the_store(server, ids)


def submit(server: RealServer, number: int, asked: list[tuple[int, dict[str, Any]]]) -> str:
    """Where the answer is lost in a kill, the request is sent again, with its key."""
    seed, call = asked[number]
    return server.submit(seed, key=f"job-{number}", **call)


def kill(server: RealServer, what: str) -> bool:
    """SIGKILL; the command is given again where that was the supervisor. False where the process has just gone."""
    server.wait(lambda: what in server.pids(), what)  # it may have gone with another one meanwhile
    try:
        server.kill(what)
    except (KeyError, ProcessLookupError):
        return False
    if what == "supervisor":
        assert server.process is not None
        server.process.wait(10)
        server.start()
    return True


def check_the_store(server: RealServer, ids: list[str]) -> None:
    ends = [line["request_id"] for line in server.events("job_ended", whole=True)]
    assert len(set(ends)) == len(ends)
    store = Store(server.folder)
    try:
        found = {job.id: job for job in store.page("image", owner=None, limit=1000)[0]}
        assert set(found) == set(ids)
        for job_id, job in found.items():
            files = {path.name for path in store.files_of(job_id).iterdir() if path.suffix == ".png"}
            assert job.ended
            assert files >= set(job.files)
            assert (job.state == "completed") == bool(job.files)
        assert store.recover() == []
        assert {path.name for path in (server.folder / "jobs").iterdir()} == set(ids)
    finally:
        store.close()
