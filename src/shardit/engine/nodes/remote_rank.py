"""A rank that was not forked by the supervisor's fork server: it connects to the supervisor and joins."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from shardit.engine.nodes.handshake import Endpoint, JoinOrder, connect
from shardit.engine.nodes.node_info import node_info
from shardit.engine.process.channel import Channel, Closed
from shardit.engine.rank.worker import main

JOIN_TIMEOUT_S = 1800.0
"""Time limit for the arrival of the other ranks, in seconds; the supervisor gives up earlier."""


class RemoteRank:
    """A rank on its way: `arrive`, then `work`."""

    def __init__(self, rank: int, model: str, flags: Mapping[str, Any] | None = None, address: str = ""):
        """address: of this machine, for the other ranks if their rendezvous is here; "" if the supervisor is on the
        machine of rank 0. See `node_info` for the rest."""
        self.rank = rank
        self._hello = {**node_info(rank, model, flags), "role": "rank", "address": address}
        self._rendezvous: socket.socket | None = None
        self._channel: Channel | None = None
        self._host = ""
        if rank == 0:
            # Held until the rendezvous, so that no other process takes the port meanwhile.
            self._rendezvous = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            self._rendezvous.bind(("", 0))
            self._hello["port"] = self._rendezvous.getsockname()[1]

    def arrive(self, endpoint: Endpoint, timeout_s: float) -> None:
        """Connect to the supervisor. Raises RankError after `timeout_s`."""
        self._channel, self._host = connect(endpoint, self._hello, timeout_s)

    def work(self, world_size: int, threads: int) -> int:
        """Join the others and run until the supervisor closes the channel; returns the exit code."""
        channel: Any = self._channel
        channel.socket.settimeout(JOIN_TIMEOUT_S)
        try:
            order: JoinOrder = channel.recv()
        except Closed:
            return 0
        channel.socket.settimeout(None)
        if self._rendezvous is not None:
            self._rendezvous.close()
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # or rank 0 would expect torchrun to serve this store
        host = order.rendezvous_host or self._host
        rendezvous = f"tcp://{f'[{host}]' if ':' in host else host}:{order.rendezvous_port}"
        where = f"rank {self.rank} on {self._hello['host']}: "
        return main(order.spec, self.rank, world_size, rendezvous, threads, channel, where)
