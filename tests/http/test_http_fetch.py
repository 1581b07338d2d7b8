"""Input pictures from other hosts: only from allowed hosts, over verified TLS, within limits."""

from __future__ import annotations

import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardit.server.http.schema.errors import ApiError
from shardit.server.http.submit import fetch
from tests.support.http_fake import WAIT_S, picture

LIMIT = 100_000


class Pictures(http.server.BaseHTTPRequestHandler):
    """Answers according to the path."""

    def do_GET(self) -> None:
        content = b"x" * (LIMIT + 1) if self.path == "/large" else picture()
        self.send_response({"/moved": 302, "/missing": 404}.get(self.path, 200))
        self.send_header("Location", "https://elsewhere.example/")
        if self.path != "/unsized":
            self.send_header("Content-Length", str(len(content) + (9 if self.path == "/short" else 0)))
        if self.path == "/slow":
            for _ in range(1000):  # a header that never ends
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Port and certificate of a host that calls itself localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on the PATH to make a certificate")
    folder = tmp_path_factory.mktemp("host")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *name, "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=WAIT_S)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that go in the middle are expected
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, cert
    server.shutdown()
    thread.join(WAIT_S)
    server.server_close()


@pytest.fixture
def port(host: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a host that is trusted, and counts as a public one."""
    monkeypatch.setenv("SSL_CERT_FILE", str(host[1]))
    monkeypatch.setattr(fetch, "public_address", lambda name, port: "127.0.0.1")
    return host[0]


def get(port: int, path: str, name: str = "localhost") -> bytes:
    return fetch.fetch(f"https://{name}:{port}{path}", ("localhost", "other.example"), LIMIT, "image")


@pytest.mark.parametrize("path", ["/cat.png", "/cat.png?size=2&x=%20", "/unsized"])
def test_an_allowed_host(port: int, path: str) -> None:
    assert get(port, path) == picture()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/moved", "answered 302"),
        ("/missing", "answered 404"),
        ("/large", f"larger than {LIMIT} bytes"),
        ("/short", "cannot be fetched"),
    ],
)
def test_answers_that_are_no_picture(port: int, path: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        get(port, path)
    assert caught.value.status == 400


def test_certificates_are_checked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ApiError, match="certificate"):
        get(port, "/cat.png", "other.example")
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ApiError, match="certificate"):
        get(port, "/cat.png")


def test_hosts_that_do_not_come_to_an_end(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_FETCH_TIMEOUT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(ApiError, match="did not come within"):
        get(port, "/slow")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ApiError, match="did not come within"):
        get(silent.getsockname()[1], "/cat.png")
    assert time.monotonic() - began < 15  # /slow alone would take 20


@pytest.mark.parametrize(
    "url",
    [
        "http://good.example/x.png",
        "https://other.example/x.png",
        "https://good.example.evil.example/x.png",
        "https://user:word@good.example/x.png",
        "https://good.example@evil.example/x.png",
        "https://good.example/x y",
        "https://good.example:999999/x.png",
        "https://[bad/x.png",
    ],
)
def test_only_listed_hosts_are_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("it looked for the host"))
    with pytest.raises(ApiError) as caught:
        fetch.fetch(url, ("good.example",), 1000, "image")
    assert caught.value.status == 400


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "0.0.0.0"])
def test_private_addresses_are_not_reached(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443))])
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it connected"))
    with pytest.raises(ApiError, match="private"):
        fetch.fetch("https://good.example/x.png", ("good.example",), 1000, "image")
