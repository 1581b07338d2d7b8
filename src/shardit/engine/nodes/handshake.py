"""Connects a rank on any machine to the supervisor by TCP; both sides prove that they know a token.

Each side sends 32 random bytes and gets an HMAC over both sides' bytes, keyed with the token. The token itself is never
sent, and nothing is unpickled before the proof. This authenticates both sides but encrypts nothing: use it in networks
that torch.distributed may be used in.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardit.engine.process.channel import Channel
from shardit.engine.process.messages import SessionSpec
from shardit.errors import RankError

GREETING = b"shardit ranks 1\n"
WELCOME = b"+"
NONCE = 32
HANDSHAKE_TIMEOUT_S = 10.0
"""Time limit for the proof of a connection, in seconds."""
MAX_HELLO = 65536
RETRY_INTERVAL_S = 0.3

# A peer whose machine or network is down is noticed after about IDLE + COUNT * INTERVAL seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}


@dataclass(frozen=True)
class Endpoint:
    """Addresses of the supervisor for ranks: any one of `hosts`, and the shared secret (hex)."""

    hosts: tuple[str, ...]
    port: int
    token: str


@dataclass(frozen=True)
class JoinOrder:
    """Sent by the supervisor to a rank when all have arrived: load your share of `spec`.

    rendezvous_host: host of the ranks' rendezvous; "" for the address at which the rank has reached the supervisor.
    """

    spec: SessionSpec
    rendezvous_host: str
    rendezvous_port: int


class Unproven(ConnectionError):
    """The other side does not know the token, or uses another protocol."""


def connect(endpoint: Endpoint, hello: Mapping[str, Any], timeout_s: float) -> tuple[Channel, str]:
    """Connect to the supervisor and send `hello`; returns the channel and the host that answered.

    Tries all hosts repeatedly. Raises RankError with the last reason after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    reason = "no address"
    while True:
        for host in endpoint.hosts:
            left = max(0.1, min(HANDSHAKE_TIMEOUT_S, deadline - time.monotonic()))
            try:
                sock = socket.create_connection((host, endpoint.port), timeout=left)
            except OSError as error:
                reason = f"{host}:{endpoint.port}: {error}"
                continue
            try:
                tune(sock)
                _prove_to_supervisor(sock, endpoint.token, hello, time.monotonic() + left)
                return Channel(sock), host
            except OSError as error:
                sock.close()
                reason = f"{host}:{endpoint.port}: {error}"
        if time.monotonic() + RETRY_INTERVAL_S >= deadline:
            raise RankError(int(hello["rank"]), f"cannot reach the supervisor within {timeout_s:g} s ({reason})")
        time.sleep(RETRY_INTERVAL_S)


def admit(sock: socket.socket, token: str) -> dict[str, Any]:
    """On the supervisor's side: verify a new connection; returns its `hello`.

    The caller sends WELCOME, or closes the connection. Raises Unproven or OSError, within HANDSHAKE_TIMEOUT_S.
    """
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
    tune(sock)
    ours = secrets.token_bytes(NONCE)
    _send(sock, GREETING + ours, deadline)
    theirs = _receive(sock, NONCE, deadline)
    if not hmac.compare_digest(_receive(sock, NONCE, deadline), _proof(token, b"rank", ours, theirs)):
        raise Unproven("it does not know the token")
    _send(sock, _proof(token, b"supervisor", ours, theirs), deadline)
    size = int.from_bytes(_receive(sock, 4, deadline), "big")
    if size > MAX_HELLO:
        raise Unproven(f"it introduces itself with {size} bytes")
    return json.loads(_receive(sock, size, deadline))


def confirm(sock: socket.socket) -> None:
    """Accept an admitted connection as the expected rank; from now on it is a channel."""
    _send(sock, WELCOME, time.monotonic() + HANDSHAKE_TIMEOUT_S)


def tune(sock: socket.socket) -> None:
    """Send small messages at once, and detect dead peers."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def address_towards(host: str, port: int) -> str | None:
    """Return the address of this machine on the route to `host`; None without a route."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def _prove_to_supervisor(sock: socket.socket, token: str, hello: Mapping[str, Any], deadline: float) -> None:
    if _receive(sock, len(GREETING), deadline) != GREETING:
        raise Unproven("something else than a supervisor answers there")
    theirs, ours = _receive(sock, NONCE, deadline), secrets.token_bytes(NONCE)
    _send(sock, ours + _proof(token, b"rank", theirs, ours), deadline)
    if not hmac.compare_digest(_receive(sock, NONCE, deadline), _proof(token, b"supervisor", theirs, ours)):
        raise Unproven("it does not know the token")
    data = json.dumps(dict(hello)).encode()
    _send(sock, len(data).to_bytes(4, "big") + data, deadline)
    if _receive(sock, len(WELCOME), deadline) != WELCOME:
        raise Unproven("it has no place for this rank")


def _proof(token: str, side: bytes, of_supervisor: bytes, of_rank: bytes) -> bytes:
    # The name of the side prevents reflecting a side's own answer back as the answer to its challenge.
    return hmac.new(bytes.fromhex(token), side + of_supervisor + of_rank, hashlib.sha256).digest()


def _receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        part = sock.recv(size - len(data))
        if not part:
            raise Unproven("it has hung up")
        data += part
        if time.monotonic() > deadline:
            raise TimeoutError("it is too slow")
    return bytes(data)


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    sock.settimeout(max(0.01, deadline - time.monotonic()))
    sock.sendall(data)
