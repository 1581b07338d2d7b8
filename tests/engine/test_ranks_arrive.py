"""Ranks on other machines connect to the supervisor; facts that must be the same on all nodes are compared."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shardit import LLM
from shardit.engine.nodes.handshake import GREETING, NONCE, Endpoint, JoinOrder, connect
from shardit.engine.nodes.node_info import node_info
from shardit.engine.nodes.rank_port import Arrival, RankPort, check_alike, join_all, listen_for_ranks
from shardit.engine.nodes.ray_placement import RayPlacement
from shardit.engine.nodes.revision import revision_of
from shardit.engine.process.channel import Closed
from shardit.engine.process.messages import SessionSpec
from shardit.errors import InputError, RankError
from shardit.server.entry.torchrun_agent import serve_as_rank
from shardit.server.flags import ServeFlags
from shardit.server.options import Executor
from shardit.server.placement.torchrun_env import LOOPBACK, RankEnv, hosts_of

PLACES = [(rank, "rank") for rank in range(2)]


@contextlib.contextmanager
def port() -> Iterator[tuple[RankPort, Endpoint]]:
    made = RankPort(listen_for_ranks("127.0.0.1"), PLACES)
    try:
        yield made, made.endpoint("127.0.0.1")
    finally:
        made.close()


def hello(rank: int, **more: Any) -> dict[str, Any]:
    return {**node_info(rank), "role": "rank", "address": "", "port": 1, **more}


# How ranks arrive.


def test_ranks_arrive_and_are_channels():
    with port() as (ranks, endpoint):
        ours = [connect(endpoint, hello(rank), 10)[0] for rank in (1, 0)]
        arrived = ranks.collect(10)
        channels = join_all([arrived[place] for place in PLACES], SessionSpec("m", None))  # type: ignore[arg-type]
        for rank, channel in enumerate(reversed(ours)):
            channel.socket.settimeout(10)
            assert channel.recv() == JoinOrder(SessionSpec("m", None), "", 1)  # type: ignore[arg-type]
            channel.send({"from": rank})
            assert channels[rank].recv() == {"from": rank}
            assert channel.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.parametrize("token", ["00" * 32, secrets.token_hex(32)], ids=["zeros", "random"])
def test_a_wrong_token_is_refused(token):
    with port() as (ranks, endpoint):
        with pytest.raises(RankError, match="cannot reach the supervisor within"):
            connect(Endpoint(endpoint.hosts, endpoint.port, token), hello(0), 0.5)
        assert ranks.refused
        connect(endpoint, hello(0), 10)  # the right one is not disturbed


def test_a_supervisor_that_does_not_know_the_token_is_refused():
    """The other side must prove itself before the rank sends or unpickles anything."""
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
            connect(Endpoint(("127.0.0.1",), server.getsockname()[1], secrets.token_hex(32)), hello(0), 0.1)
        thread.join(10)
    assert said == [b""]


class Bomb:
    def __reduce__(self) -> Any:
        return (os.abort, ())


@pytest.mark.parametrize("data", [pickle.dumps(Bomb()), b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(70_000)])
def test_unverified_connections_are_refused(data):
    with port() as (ranks, endpoint):
        with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1000):
                    pass
        kept = [connect(endpoint, hello(rank), 10)[0] for rank in (0, 1)]  # dropped, they would be closed
        assert len(ranks.collect(10)) == len(kept)


def test_a_place_is_given_once():
    with port() as (ranks, endpoint):
        kept, _ = connect(endpoint, hello(0), 10)
        for other in (hello(0), hello(5), hello(1, role="stranger")):
            with pytest.raises(RankError, match="cannot reach the supervisor"):
                connect(endpoint, other, 0.1)
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
    first = {**node_info(0, flags={"model": "m"}), "host": "near"}
    second = {**node_info(1, flags={"model": "m"}), "host": "far", **of_second}
    return [Arrival(None, told) for told in (first, second)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("second", "text"),
    [
        ({"flags": {"model": "n"}}, "rank 1 on far was started with model n, rank 0 on near with m"),
        ({"versions": {**node_info(0)["versions"], "torch": "1.0"}}, "rank 1 on far has torch 1.0, rank 0 on near has"),
        (
            {"versions": {**node_info(0)["versions"], "shardit sources": "0"}},
            "rank 1 on far has shardit sources 0, rank 0",
        ),
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
    assert revision_of(near) == revision_of(far) is not None
    assert revision_of(tmp_path / "none") is node_info(0, "tiny/flux")["model"] is None
    (far / "vae" / "weights").write_bytes(b"v" * 10)
    ranks = arrivals(model=node_info(1, str(far))["model"])
    ranks[0].node_info["model"] = node_info(0, str(near))["model"]
    with pytest.raises(InputError, match="has other files for rank 1 on far than for rank 0 on near"):
        check_alike(ranks, "/m")


def test_flags():
    def flags(**more: Any) -> ServeFlags:
        return ServeFlags(model="tiny/flux", **more)

    options = flags(executor=Executor.ray, num_nodes=2, pipeline_parallel_size=2).options()
    assert (options.executor, options.num_nodes) == ("ray", 2)
    with pytest.raises(InputError, match="--num-nodes needs --executor ray"):
        flags(num_nodes=2, pipeline_parallel_size=2).options()
    with pytest.raises(InputError, match="3 ranks cannot be distributed evenly over --num-nodes 2"):
        flags(executor=Executor.ray, num_nodes=2, pipeline_parallel_size=3).options()
    with pytest.raises(InputError, match="--num-nodes must be at least 1"):
        flags(executor=Executor.ray, num_nodes=0).options()


def test_addresses_of_rank_0():
    assert hosts_of(RankEnv(0, 2, 2, "node-0.example", 0)) == LOOPBACK
    assert hosts_of(RankEnv(0, 2, 1, "127.0.0.1", 0)) == LOOPBACK
    hosts = hosts_of(RankEnv(0, 2, 1, "203.0.113.7", 0))
    assert {"203.0.113.7", socket.gethostname()} <= set(hosts)
    assert not any(host.startswith("127.") for host in hosts)


def test_torchrun_with_another_number_of_ranks(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="torchrun has started 3 ranks, but the parallel sizes need 2"):
        serve_as_rank(ServeFlags(model="tiny/flux", pipeline_parallel_size=2).options())


def test_ray_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'^--executor ray needs Ray: pip install "shardit\[ray\]"$'):
        RayPlacement(1, "--executor ray")
    with pytest.raises(InputError, match=r'^distributed_executor_backend="ray" needs Ray: pip install'):
        LLM("tiny/llama", distributed_executor_backend="ray")
