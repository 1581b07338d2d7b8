"""The supervisor's port for ranks on any machine: accepts them and checks that their nodes match."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shardit.engine.nodes.handshake import Endpoint, JoinOrder, admit, confirm
from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.messages import SessionSpec
from shardit.errors import InputError, RankError

POLL_INTERVAL_S = 0.2
MAX_UNPROVEN = 256
"""Number of unverified connections at a time; more are closed at once."""

Place = tuple[int, str]
"""A rank's number, and the purpose of the connection: "rank" for its messages, "agent" to end it."""


@dataclass(frozen=True)
class Arrival:
    """A connection of a rank, and its properties (`engine/nodes/node_info.py`)."""

    channel: Channel
    node_info: dict[str, Any]

    @property
    def name(self) -> str:
        """The rank and its host, for messages."""
        return f"rank {self.node_info['rank']} on {self.node_info['host']}"


class RankPort:
    """A listening socket at which the ranks of one start arrive, with a token of its own."""

    def __init__(self, listener: socket.socket, places: Iterable[Place], token: str | None = None):
        self.token = token or secrets.token_hex(32)
        self._listener = listener
        self._missing = set(places)
        self._arrived: dict[Place, Arrival] = {}
        self._change = threading.Condition()
        self._closed = False
        self._unproven = threading.Semaphore(MAX_UNPROVEN)
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def endpoint(self, *hosts: str) -> Endpoint:
        """Return the addresses for ranks, if this machine is known as `hosts`."""
        return Endpoint(tuple(dict.fromkeys(hosts)), self._listener.getsockname()[1], self.token)

    def collect(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> dict[Place, Arrival]:
        """Wait until all places are taken, then stop accepting. `check` is called now and then; an exception from it
        ends the wait. Raises RankError after `timeout_s`, and if the port is closed meanwhile."""
        deadline = time.monotonic() + timeout_s
        with self._change:
            while self._missing and not self._closed:
                if time.monotonic() >= deadline:
                    missing = ", ".join(str(rank) for rank in sorted({rank for rank, _ in self._missing}))
                    raise RankError(-1, f"after {timeout_s:g} s these ranks have not arrived: {missing}")
                self._change.wait(POLL_INTERVAL_S)
                if self._missing:
                    check()
            closed = self._closed
        self._stop_accepting()
        if closed:
            raise RankError(-1, "the server stops")
        return dict(self._arrived)

    def has_arrived(self, rank: int) -> bool:
        """Return whether all connections of a rank have arrived."""
        with self._change:
            return all(place[0] != rank for place in self._missing)

    def close(self) -> None:
        """Stop accepting, and close the connections that have arrived."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._stop_accepting()
        for arrival in list(self._arrived.values()):
            arrival.channel.close()

    def _stop_accepting(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if not self._unproven.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._admit, args=(sock,), daemon=True).start()

    def _admit(self, sock: socket.socket) -> None:
        try:
            node_info = admit(sock, self.token)
            place = (int(node_info["rank"]), str(node_info["role"]))
            with self._change:
                if place not in self._missing or self._closed:
                    raise ValueError(f"{place} is not expected")
                confirm(sock)
                self._missing.remove(place)
                self._arrived[place] = Arrival(Channel(sock), node_info)
                self._change.notify_all()
        except (OSError, ValueError, KeyError, TypeError):
            self.refused += 1
            sock.close()
        finally:
            self._unproven.release()


def join_all(ranks: Sequence[Arrival], spec: SessionSpec) -> list[Channel]:
    """Start loading on ranks whose nodes match; returns their channels. Raises InputError, RankError."""
    check_alike(ranks, spec.model)
    first = ranks[0].node_info
    order = JoinOrder(spec, first["address"], first["port"])
    for arrival in ranks:
        try:
            arrival.channel.send(order)
        except (Closed, OSError):
            raise RankError(arrival.node_info["rank"], f"{arrival.name} has left before the start") from None
    return [arrival.channel for arrival in ranks]


def check_alike(ranks: Sequence[Arrival], model: str) -> None:
    """Raise InputError if ranks were started differently, or their nodes have different packages or model files."""
    first = ranks[0]
    for other in ranks[1:]:
        for flag in sorted({*first.node_info["flags"], *other.node_info["flags"]}):
            value, theirs = (arrival.node_info["flags"].get(flag) for arrival in (first, other))
            if theirs != value:
                raise InputError(
                    f"{other.name} was started with {flag} {theirs}, {first.name} with {value}; "
                    "use the same command on every node"
                )
        for package, version in first.node_info["versions"].items():
            theirs = other.node_info["versions"].get(package, "none")
            if theirs != version:
                raise InputError(
                    f"{other.name} has {package} {theirs}, {first.name} has {version}; install the same on every node"
                )
    having = [arrival for arrival in ranks if arrival.node_info["model"] is not None]
    lacking = [arrival for arrival in ranks if arrival.node_info["model"] is None]
    if having and lacking:
        raise InputError(
            f"there is no folder {model} for {lacking[0].name}, but there is one for {having[0].name}; "
            "copy the model to every node, or put it where all nodes find it"
        )
    for other in having:
        if other.node_info["model"] != having[0].node_info["model"]:
            raise InputError(
                f"the folder {model} has other files for {other.name} than for {having[0].name}; "
                "copy the model again, the same to every node"
            )


def listen_for_ranks(host: str = "") -> socket.socket:
    """Return a listening socket on a free port; "" for all addresses of this machine, IPv4 and IPv6 if it has both."""
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, 0), family=family, backlog=256)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=256, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=256)
