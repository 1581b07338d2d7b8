"""Ranks that Ray has placed on two nodes of a cluster on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import tempfile
import time
from typing import Any

import pytest

from shardit import LLM, EngineArgs, SamplingParams
from shardit.engine.nodes.ray_connection import RayConnection
from shardit.errors import InputError
from tests.support.nodes import TEXT_PROMPT, Servers, equal, expected, expected_text
from tests.support.paths import ROOT


def has_ray() -> bool:
    found = importlib.util.find_spec("ray") is not None
    assert found or os.environ.get("CI") != "true", "install the extra dev, which has ray"
    return found


needs_ray = pytest.mark.skipif(not has_ray(), reason="ray is not installed")


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes on this machine."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
        made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        made.add_node(**small)
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def cluster(nodes):
    """The cluster, without actors of earlier tests."""
    until = time.monotonic() + 20
    while ray_ranks():
        assert time.monotonic() < until, ray_ranks()
        time.sleep(0.1)
    return nodes


@pytest.fixture
def folder_of_ray():
    """An empty folder where a cluster that is started finds no other; short, as the names of its sockets begin so."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield pathlib.Path(folder)


def serve_by_ray(
    servers: Servers, cluster: Any, *flags: str, model: str = "tiny/flux", **environment: str
) -> subprocess.Popen:
    more = ("--executor=ray", f"--data-dir={servers.data}", "--port=0", *flags)
    return servers.run("shardit", "serve", model, *more, RAY_ADDRESS=cluster.address, **environment)


@needs_ray
def test_two_nodes_of_ray(servers, cluster):
    """A job has the bits of plain diffusers; SIGTERM ends the server, and its actors."""
    server = serve_by_ray(servers, cluster, "--pipeline-parallel-size=2", "--num-nodes=2")
    assert equal(expected(), servers.result(servers.ask()))
    assert len(ray_ranks()) == 2
    begin = time.monotonic()
    server.terminate()
    assert server.wait(20) == 0
    assert time.monotonic() - begin < 10
    servers.wait(lambda: not ray_ranks(), 20)


@needs_ray
def test_texts_of_two_nodes_of_ray(servers, cluster):
    """A language model has the tokens of plain transformers."""
    flags = ("--pipeline-parallel-size=2", "--num-nodes=2")
    server = serve_by_ray(servers, cluster, *flags, model="tiny/llama")
    assert servers.text() == expected_text()
    assert len(ray_ranks()) == 2
    server.terminate()
    assert server.wait(20) == 0


@needs_ray
def test_llm_over_two_nodes_of_ray(cluster, monkeypatch):
    """`LLM` has the tokens of plain transformers. A second one has the same connection to Ray, and leaves it open for
    the first."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    args = EngineArgs("tiny/llama", pipeline_parallel_size=2, distributed_executor_backend="ray", num_nodes=2)
    with LLM(**args.as_kwargs()) as llm:
        assert len(ray_ranks()) == 2
        other = RayConnection()
        other.open()
        other.close()
        made = llm.generate([TEXT_PROMPT], SamplingParams(max_tokens=12, temperature=0))
        assert made[0].outputs[0].text == expected_text()
    assert not ray.is_initialized()


@needs_ray
def test_a_connection_of_the_program_stays(cluster):
    import ray

    ray.init(address=cluster.address, logging_level="ERROR")
    try:
        connection = RayConnection()
        connection.open()
        connection.close()
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@needs_ray
def test_ray_is_started_where_none_runs(servers, folder_of_ray):
    """On this machine alone; it goes on for as long as the server, and ends with it."""
    flags = ("--executor=ray", "--pipeline-parallel-size=2", f"--data-dir={servers.data}", "--port=0")
    server = servers.run("shardit", "serve", "tiny/flux", *flags, RAY_ADDRESS="", RAY_TMPDIR=str(folder_of_ray))
    assert equal(expected(), servers.result(servers.ask()))
    assert len(of_cluster(folder_of_ray)) >= 2
    server.terminate()
    assert server.wait(20) == 0
    servers.wait(lambda: not of_cluster(folder_of_ray), 20)


@pytest.mark.full
@needs_ray
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_actor_ends_in_the_middle(servers, cluster, how):
    steps = {"num_inference_steps": 200}
    serve_by_ray(servers, cluster, "--pipeline-parallel-size=2", "--num-nodes=2", "--step-timeout=15")
    job_id = servers.ask(**steps)
    servers.wait(lambda: servers.store.get(job_id).state == "in_progress")
    time.sleep(1.0)
    os.kill(ray_ranks()[-1], how)
    picture = servers.result(job_id)
    assert servers.store.get(job_id).attempts >= 2
    assert equal(expected(**steps), picture)


@pytest.mark.full
@needs_ray
def test_ray_has_too_little(servers, cluster):
    server = serve_by_ray(servers, cluster, "--pipeline-parallel-size=4", "--num-nodes=2", SHARDIT_RAY_WAIT="3")
    assert server.wait(60) == 2
    lines = [line for line in servers.said().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Ray has not given 2 nodes with 2 CPU each within 3 s (SHARDIT_RAY_WAIT): it has 2 nodes: " in lines[0]
    assert "free are 2 CPU" in lines[0]


@pytest.mark.full
@needs_ray
def test_no_ray_at_that_address(servers):
    server = servers.run(
        *("shardit", "serve", "tiny/flux", "--executor=ray", f"--data-dir={servers.data}", "--port=0"),
        RAY_ADDRESS="127.0.0.1:1",
    )
    assert server.wait(120) == 2
    assert "error: there is no Ray cluster at RAY_ADDRESS=127.0.0.1:1 that can be used" in servers.said()


@needs_ray
def test_a_cluster_that_is_gone_is_not_waited_for(tmp_path, monkeypatch):
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text("127.0.0.1:1\n")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(InputError, match=rf"no Ray cluster at 127.0.0.1:1, which {file} names \(remove it"):
        RayConnection().open()


def ray_ranks() -> list[int]:
    """Processes of actors that run a rank; Ray names them."""
    return [pid for pid, line in commands() if line.startswith(b"ray::RayRank")]


def of_cluster(folder: pathlib.Path) -> list[int]:
    """Processes of the cluster itself that has its files in this folder."""
    return [pid for pid, line in commands() if str(folder).encode() in line]


def commands() -> list[tuple[int, bytes]]:
    """All processes with their command lines."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                found.append((int(entry.name), (entry / "cmdline").read_bytes()))
    return sorted(found)
