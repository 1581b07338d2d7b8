"""Ranks on several machines: how they reach the supervisor, ranks of torchrun on two nodes, ranks of Ray.

Nodes are processes of this machine; what a second machine could have that the first has not is told in words.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from shardit.engine.channel import Closed
from shardit.engine.connect import GREETING, NONCE, Join, Reach, connect
from shardit.engine.facts import facts, fingerprint
from shardit.engine.messages import SessionSpec
from shardit.errors import InputError, RankError
from shardit.server.flags import Executor, ServeFlags
from shardit.server.jobs import NewJob
from shardit.server.keeper import serve_as_rank
from shardit.server.ray_placement import RayPlacement
from shardit.server.remote_ranks import Arrival, RankPort, check_alike, join_all, listen_for_ranks
from shardit.server.seat import LOOPBACK, Seat, hosts_of
from shardit.server.store import Store

HERE = pathlib.Path(__file__).parent
PLACES = [(rank, "rank") for rank in range(2)]


@contextlib.contextmanager
def port() -> Iterator[tuple[RankPort, Reach]]:
    made = RankPort(listen_for_ranks("127.0.0.1"), PLACES)
    try:
        yield made, made.reach("127.0.0.1")
    finally:
        made.close()


def hello(rank: int, **more: Any) -> dict[str, Any]:
    return {**facts(rank), "role": "rank", "address": "", "port": 1, **more}


# How ranks arrive.


def test_ranks_arrive_and_are_channels():
    with port() as (ranks, reach):
        ours = [connect(reach, hello(rank), 10)[0] for rank in (1, 0)]
        arrived = ranks.collect(10)
        channels = join_all([arrived[place] for place in PLACES], SessionSpec("m", None))  # type: ignore[arg-type]
        for rank, channel in enumerate(reversed(ours)):
            channel.socket.settimeout(10)
            assert channel.recv() == Join(SessionSpec("m", None), "", 1)  # type: ignore[arg-type]
            channel.send({"from": rank})
            assert channels[rank].recv() == {"from": rank}
            assert channel.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.parametrize("token", ["00" * 32, secrets.token_hex(32)])
def test_a_wrong_token_is_refused(token):
    with port() as (ranks, reach):
        with pytest.raises(RankError, match="cannot reach the supervisor within"):
            connect(Reach(reach.hosts, reach.port, token), hello(0), 0.5)
        assert ranks.refused
        connect(reach, hello(0), 10)  # the right one is not disturbed


def test_a_supervisor_that_does_not_know_the_token_is_refused():
    """Who answers has to prove itself before the rank says or unpickles anything."""
    said = []

    def impostor(server: socket.socket) -> None:
        with server.accept()[0] as sock:
            sock.sendall(GREETING + b"x" * NONCE)
            sock.recv(2 * NONCE)
            sock.sendall(b"y" * NONCE)
            said.append(sock.recv(1000))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=impostor, args=(server,))
        thread.start()
        with pytest.raises(RankError, match="does not know the token"):
            connect(Reach(("127.0.0.1",), server.getsockname()[1], secrets.token_hex(32)), hello(0), 0.1)
        thread.join(10)
    assert said == [b""]


class Bomb:
    def __reduce__(self) -> Any:
        return (os.abort, ())


@pytest.mark.parametrize("data", [pickle.dumps(Bomb()), b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(70_000)])
def test_strangers_are_not_listened_to(data):
    with port() as (ranks, reach):
        with socket.create_connection(("127.0.0.1", reach.port), timeout=10) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1000):
                    pass
        kept = [connect(reach, hello(rank), 10)[0] for rank in (0, 1)]  # dropped, they would be closed
        assert len(ranks.collect(10)) == len(kept)


def test_a_place_is_given_once():
    with port() as (ranks, reach):
        kept, _ = connect(reach, hello(0), 10)
        for other in (hello(0), hello(5), hello(1, role="stranger")):
            with pytest.raises(RankError, match="cannot reach the supervisor"):
                connect(reach, other, 0.1)
        with pytest.raises(RankError, match=r"these ranks have not arrived: 1$"):
            ranks.collect(0.3)
        kept.socket.settimeout(10)
        ranks.close()
        with pytest.raises(Closed):
            kept.recv()


def test_a_wait_ends_when_the_server_stops():
    with port() as (ranks, _):
        threading.Timer(0.2, ranks.close).start()
        with pytest.raises(RankError, match="the server stops"):
            ranks.collect(60)


# What has to be the same on every node.


def arrivals(**of_second: Any) -> list[Arrival]:
    first = {**facts(0, flags={"model": "m"}), "host": "near"}
    second = {**facts(1, flags={"model": "m"}), "host": "far", **of_second}
    return [Arrival(None, told) for told in (first, second)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("second", "text"),
    [
        ({"flags": {"model": "n"}}, "rank 1 on far was started with model n, rank 0 on near with m"),
        ({"versions": {**facts(0)["versions"], "torch": "1.0"}}, "rank 1 on far has torch 1.0, rank 0 on near has"),
        ({"model": "digest"}, "there is no folder /m for rank 0 on near, but there is one for rank 1 on far"),
    ],
)
def test_nodes_that_differ_are_refused(second, text):
    check_alike(arrivals(), "/m")
    with pytest.raises(InputError) as caught:
        check_alike(arrivals(**second), "/m")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_on_one_node_only_or_differs(tmp_path):
    near, far = tmp_path / "near", tmp_path / "far"
    for folder in (near, far):
        (folder / "vae").mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "vae" / "weights").write_bytes(b"w" * 10)
    (near / ".cache").mkdir()
    (near / ".cache" / "x").write_text("left by a download")
    assert fingerprint(str(near)) == fingerprint(str(far)) is not None
    assert fingerprint(str(tmp_path / "none")) is fingerprint("tiny/flux") is None
    (far / "vae" / "weights").write_bytes(b"v" * 10)
    ranks = arrivals(model=fingerprint(str(far)))
    ranks[0].facts["model"] = fingerprint(str(near))
    with pytest.raises(InputError, match="has other files for rank 1 on far than for rank 0 on near"):
        check_alike(ranks, "/m")


def test_flags():
    def flags(**more: Any) -> ServeFlags:
        return ServeFlags(model="tiny/flux", **more)

    options = flags(executor=Executor.ray, num_nodes=2, pipeline_parallel_size=2).options()
    assert (options.executor, options.num_nodes) == ("ray", 2)
    with pytest.raises(InputError, match="--num-nodes needs --executor ray"):
        flags(num_nodes=2, pipeline_parallel_size=2).options()
    with pytest.raises(InputError, match="3 ranks cannot be spread evenly over --num-nodes 2"):
        flags(executor=Executor.ray, num_nodes=2, pipeline_parallel_size=3).options()
    with pytest.raises(InputError, match="--num-nodes must be at least 1"):
        flags(executor=Executor.ray, num_nodes=0).options()


def test_where_rank_0_says_it_can_be_reached():
    assert hosts_of(Seat(0, 2, 2, "node-0.example", 0)) == LOOPBACK
    assert hosts_of(Seat(0, 2, 1, "127.0.0.1", 0)) == LOOPBACK
    hosts = hosts_of(Seat(0, 2, 1, "203.0.113.7", 0))
    assert {"203.0.113.7", socket.gethostname()} <= set(hosts)
    assert not any(host.startswith("127.") for host in hosts)


def test_torchrun_with_another_number_of_ranks(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="torchrun has started 3 ranks, but the parallel sizes need 2"):
        serve_as_rank(ServeFlags(model="tiny/flux", pipeline_parallel_size=2).options())


def test_ray_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "shardit\[ray\]"'):
        RayPlacement(ServeFlags(model="tiny/flux", executor=Executor.ray).options())


# Servers.

CALL = {"prompt": "a cat", "height": 128, "width": 128, "num_inference_steps": 2, "max_sequence_length": 32}


class Servers:
    """The processes of one server, and its jobs."""

    def __init__(self, folder: pathlib.Path):
        self.data, self.logs = folder / "data", folder / "logs"
        self.logs.mkdir()
        self.processes: list[subprocess.Popen] = []
        self.store = Store(self.data)

    def run(self, *command: str, cwd: pathlib.Path | None = None, **environment: str) -> subprocess.Popen:
        path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
        log = (self.logs / str(len(self.processes))).open("w")
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
            )
        )
        return self.processes[-1]

    def torchrun(self, *flags: str, restarts: int = 0, cwds: tuple[pathlib.Path | None, ...] = (None, None)) -> None:
        """Two nodes with one rank each."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            master = free.getsockname()[1]
        for node, cwd in enumerate(cwds):
            nodes = (f"--nnodes={len(cwds)}", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1")
            more = (f"--master-port={master}", f"--max-restarts={restarts}", "-m", "shardit", "serve", *flags)
            self.run("torch.distributed.run", *nodes, *more, f"--data-dir={self.data}", "--port=0", cwd=cwd)

    def ask(self, **more: Any) -> str:
        """Put a job into the queue."""
        return self.store.accept(NewJob("image", {**CALL, **more}, 7, 1.0), queue_size=10)[0].id

    def result(self, job_id: str, timeout_s: float = 200) -> Image.Image:
        """The picture of a job, when it has completed."""
        self.wait(lambda: (job := self.store.get(job_id)) is not None and job.ended, timeout_s)
        job = self.store.get(job_id)
        assert job is not None
        assert job.state == "completed", (job.error, self.said())
        return Image.open(self.store.files_of(job_id) / job.files[0])

    def wait(self, what: Callable[[], Any], timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.logs.iterdir()))

    def everything(self) -> list[int]:
        """All processes of the server that live, by the data folder in their command lines."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and str(self.data).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        """Rank processes of torchrun: what a keeper has forked has its command line and is its child."""
        known = self.everything()
        return [pid for pid in known if parent(parent(pid)) in {process.pid for process in self.processes}]

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        for pid in self.everything():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.store.close()


def parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


@pytest.fixture
def servers(tmp_path):
    made = Servers(tmp_path)
    try:
        yield made
    finally:
        made.close()


def expected(**more: Any) -> Image.Image:
    from .real_omni import by_diffusers

    return by_diffusers("flux", 7, **{**CALL, **more})[0]


def equal(one: Image.Image, other: Image.Image) -> bool:
    return (one.mode, one.size, one.tobytes()) == (other.mode, other.size, other.tobytes())


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


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "keeper 0", "keeper 1", "supervisor", "hung rank"])
def test_torchrun_starts_all_anew(servers, victim):
    """Whoever dies in the middle of a job, torchrun starts all ranks anew, and the job has its bits."""
    steps = {"num_inference_steps": 200}
    servers.torchrun("tiny/flux", "--pipeline-parallel-size=2", "--step-timeout=15", restarts=2)
    job_id = servers.ask(**steps)
    servers.wait(lambda: servers.store.get(job_id).state == "in_progress")
    time.sleep(1.0)
    ranks = servers.ranks()
    agents = [process.pid for process in servers.processes]
    rank = next(pid for pid in ranks if parent(parent(pid)) == agents["1" in victim or "hung" in victim])
    if victim == "supervisor":
        keeper = parent(next(pid for pid in ranks if parent(parent(pid)) == agents[0]))
        children = pathlib.Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        (target,) = (int(pid) for pid in children if int(pid) not in ranks)
    else:
        target = parent(rank) if "keeper" in victim else rank
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


def has_ray() -> bool:
    found = importlib.util.find_spec("ray") is not None
    assert found or os.environ.get("CI") != "true", "install the extra dev, which has ray"
    return found


needs_ray = pytest.mark.skipif(not has_ray(), reason="ray is not installed")


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]))
        made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        made.add_node(**small)
        try:
            yield made
        finally:
            made.shutdown()


def serve_by_ray(servers: Servers, cluster: Any, *flags: str, **environment: str) -> subprocess.Popen:
    more = ("--executor=ray", f"--data-dir={servers.data}", "--port=0", *flags)
    return servers.run("shardit", "serve", "tiny/flux", *more, RAY_ADDRESS=cluster.address, **environment)


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


def ray_ranks() -> list[int]:
    """Processes of actors that run a rank; Ray names them."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and (entry / "cmdline").read_bytes().startswith(b"ray::RayRank"):
                found.append(int(entry.name))
    return sorted(found)
