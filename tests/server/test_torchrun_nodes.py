"""Ranks that torchrun has placed on two nodes, which are processes of this machine."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import sys
import time

import pytest

from tests.support.nodes import equal, expected, expected_text, parent


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_two_nodes_of_torchrun(servers):
    """A job has the bits of plain diffusers; SIGTERM to both ends all, in order."""
    servers.torchrun("tiny/flux", "--pipeline-parallel-size=2")
    assert equal(expected(), servers.result(servers.ask()))
    begin = time.monotonic()
    for process in servers.processes:
        process.terminate()
    servers.wait(lambda: not servers.everything(), 30)
    assert time.monotonic() - begin < 10
    assert "ranks_down" not in servers.said()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("deaths", [0, pytest.param(1, marks=pytest.mark.full)])
def test_texts_of_two_nodes_of_torchrun(servers, deaths):
    """A language model has the tokens of plain transformers, also after the death of a rank."""
    servers.torchrun("tiny/llama", "--pipeline-parallel-size=2", restarts=deaths)
    assert servers.text() == expected_text()
    for _ in range(deaths):
        os.kill(servers.ranks()[0], signal.SIGKILL)
        servers.wait(lambda: servers.said().count('"event": "serving"') == 2)
        assert servers.text() == expected_text()


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "agent 0", "agent 1", "supervisor", "hung rank"])
def test_torchrun_restarts_all(servers, victim):
    """Any process dies in the middle of a job: torchrun restarts all ranks, and the job has its bits."""
    steps = {"num_inference_steps": 200}
    servers.torchrun("tiny/flux", "--pipeline-parallel-size=2", "--step-timeout=15", restarts=2)
    job_id = servers.ask(**steps)
    servers.wait(lambda: servers.store.get(job_id).state == "in_progress")
    time.sleep(1.0)
    ranks = servers.ranks()
    agents = [process.pid for process in servers.processes]
    rank = next(pid for pid in ranks if parent(parent(pid)) == agents["1" in victim or "hung" in victim])
    if victim == "supervisor":
        agent = parent(next(pid for pid in ranks if parent(parent(pid)) == agents[0]))
        children = pathlib.Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        (target,) = (int(pid) for pid in children if int(pid) not in ranks)
    else:
        target = parent(rank) if "agent" in victim else rank
    os.kill(target, signal.SIGSTOP if "hung" in victim else signal.SIGKILL)
    picture = servers.result(job_id)
    assert servers.store.get(job_id).attempts >= 2
    assert equal(expected(**steps), picture)


@pytest.mark.full
def test_torchrun_and_mistakes(servers, tmp_path):
    """A model that one node lacks, flags that differ: one line that names the rank."""
    from shardit.models import tiny

    (tmp_path / "other").mkdir()
    tiny.write("flux", tmp_path / "one" / "model")
    servers.torchrun("./model", "--pipeline-parallel-size=2", cwds=(tmp_path / "one", tmp_path / "other"))
    codes = [process.wait(120) for process in servers.processes]
    assert all(codes), codes
    lines = [line for line in servers.said().splitlines() if line.startswith("error: ")]
    name = socket.gethostname()
    assert lines == [
        f"error: there is no folder ./model for rank 1 on {name}, but there is one for rank 0 on {name}; "
        "copy the model to every node, or put it where all nodes find it"
    ]
