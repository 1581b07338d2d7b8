"""Fetches input images from trusted hosts only."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from shardit.server.http.schema.errors import ApiError

_CONNECT_TIMEOUT_S, _FETCH_TIMEOUT_S = 10.0, 20.0


def fetch(url: str, hosts: Sequence[str], most_bytes: int, param: str) -> bytes:
    """Return the bytes at `url`. Blocks for at most about 30 s; follows no redirect, and contacts no private address.

    Raises ApiError (400) if that is impossible or forbidden.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError:
        raise _refused(param, "is no valid address") from None
    if parts.scheme != "https" or host not in hosts or parts.username or parts.password:
        raise _refused(param, f"must be an https address on one of: {', '.join(hosts)}")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if any(ord(char) <= 32 or ord(char) > 126 for char in target):
        raise _refused(param, "is no valid address; encode its special characters")
    try:
        return _get(host, port, target, most_bytes, param)
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise _refused(param, f"cannot be fetched from {host}: {reason}") from error


def public_address(host: str, port: int) -> str:
    """Return the address of a host, looked up once so that it cannot change between check and use. Raises OSError."""
    found = [str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not ipaddress.ip_address(address.split("%")[0]).is_global:
            raise OSError("its address is a private one")
    return found[0]


def _get(host: str, port: int, target: str, most_bytes: int, param: str) -> bytes:
    context = ssl.create_default_context()
    connection = http.client.HTTPSConnection(host, port)
    with (
        socket.create_connection((public_address(host, port), port), timeout=_CONNECT_TIMEOUT_S) as raw,
        context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False) as sock,
        _ended_after(sock, _FETCH_TIMEOUT_S),
    ):
        sock.do_handshake()
        connection.sock = sock
        connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise _refused(param, f"cannot be fetched from {host}: it answered {answer.status}")
        data = answer.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise _refused(param, f"is larger than {most_bytes} bytes")
    if answer.length:
        raise http.client.IncompleteRead(data, answer.length)
    return data


@contextmanager
def _ended_after(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Close a connection after this time, however slowly its other end sends, and raise TimeoutError."""
    late = threading.Event()

    def end() -> None:
        late.set()
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not the TLS method while another thread reads

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError(f"it did not come within {seconds:g} s")


def _refused(param: str, text: str) -> ApiError:
    return ApiError(400, f"{param} {text}", code="invalid_image", param=param)
