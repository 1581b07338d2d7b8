"""A rank under torchrun, in the process forked by its agent. Rank 0 writes the address of the supervisor into
torch.distributed's store, the others read it.

torchrun may keep one store over all its restarts, with entries of earlier ranks. So the address may be out of date: it
is tried, and read again. For the same reason this store is not the ranks' rendezvous (see `engine/nodes/handshake.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shardit.engine.nodes.handshake import Endpoint
from shardit.engine.process.channel import Channel
from shardit.errors import RankError
from shardit.server.options import ServeOptions
from shardit.server.placement.torchrun_env import RankEnv, flags_of

if TYPE_CHECKING:
    from shardit.engine.nodes.remote_rank import RemoteRank

KEY = "shardit/supervisor"
STORE_TIMEOUT_S = 600.0
"""Longest wait for rank 0 to write, in seconds."""
ATTEMPT_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 60.0

_stores: list[Any] = []  # without torchrun's own store rank 0 is its server, until the process ends


def run_rank(options: ServeOptions, rank_env: RankEnv, endpoint: Endpoint | None, agent: Channel) -> int:
    """In the forked process: find the supervisor, send its address to the agent, and work. endpoint: known on rank
    0."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it logs every optional package that is missing
    from shardit.engine.nodes.remote_rank import RemoteRank
    from shardit.engine.process.process import threads_per_rank

    rank = RemoteRank(rank_env.rank, options.model, flags_of(options))
    if endpoint is not None:
        publish(endpoint)
        rank.arrive(endpoint, CONNECT_TIMEOUT_S)
    else:
        endpoint = find_supervisor(rank)
    agent.send(endpoint)
    return rank.work(rank_env.world_size, threads_per_rank(rank_env.local_size))


def exit_with_agent(sock: socket.socket) -> None:
    """In the rank, if the kernel cannot do it: exit when the agent is gone."""
    with contextlib.suppress(OSError):
        sock.recv(1)
    os._exit(1)


def publish(endpoint: Endpoint) -> None:
    """On rank 0: write the address of the supervisor into the store."""
    _store().set(KEY, json.dumps(dataclasses.asdict(endpoint)))


def find_supervisor(rank: RemoteRank) -> Endpoint:
    """On other ranks: connect `rank` to the supervisor whose address is in the store. Raises RankError."""
    store, deadline = _store(), time.monotonic() + STORE_TIMEOUT_S
    while True:
        try:
            stored = json.loads(store.get(KEY))
        except RuntimeError as error:  # its server is gone, or no rank has written
            text = str(error).splitlines()[0]
            raise RankError(rank.rank, f"rank 0 has not published the address of the supervisor ({text})") from None
        endpoint = Endpoint(tuple(stored["hosts"]), stored["port"], stored["token"])
        try:
            rank.arrive(endpoint, ATTEMPT_TIMEOUT_S)
            return endpoint
        except RankError:
            if time.monotonic() > deadline:
                raise


def _store() -> Any:
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=STORE_TIMEOUT_S)))
    _stores.append(store)
    return store
