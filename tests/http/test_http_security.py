"""Access control, limits of requests, and hostile requests."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardit.server.keys import digest
from shardit.server.options import RequestLimits
from tests.support.http_calls import NOW, edit
from tests.support.http_fake import IMAGE, VIDEO, WAIT_S, Served, form, picture, serving

LIMIT = 200_000

LOCAL = "Host: localhost\r\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = RequestLimits(body_bytes=LIMIT, pixels=160 * 128)  # what a tiny model makes by itself
    with serving(tmp_path_factory.mktemp("images"), IMAGE, limits=limits, queue_size=100_000) as served:
        yield served


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    hashes = (digest("alpha"), digest("beta"))
    limits = RequestLimits(jobs_per_key=2)
    folder = tmp_path_factory.mktemp("keyed")
    with serving(folder, VIDEO, api_key_hashes=hashes, limits=limits) as served:
        yield served


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# Keys.


@pytest.mark.parametrize("path", ["/v1/models", "/v1/videos", "/v1/server", "/metrics", "/openapi.json", "/v1/none"])
def test_keys_are_needed(keyed: Served, path: str) -> None:
    for headers in ({}, bearer("gamma"), {"Authorization": "Basic alpha"}, bearer(""), bearer("\xe9")):
        status, answer, got = keyed.call("GET", path, headers=headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert got["www-authenticate"] == "Bearer"
    assert keyed.call("GET", path, headers=bearer("alpha"))[0] == (404 if path == "/v1/none" else 200)


def test_health_needs_no_key(keyed: Served) -> None:
    assert keyed.call("GET", "/health")[0] == 200
    assert keyed.call("GET", "/ready")[0] == 200
    assert keyed.call("GET", "/")[0] in (200, 401)  # 401 where no page is installed


def test_jobs_of_other_keys_are_hidden(keyed: Served) -> None:
    keyed.supervisor.held = True
    _, job, _ = keyed.call("POST", "/v1/videos", {"prompt": "mine"}, bearer("alpha"))
    path = f"/v1/videos/{job['id']}"
    for method, further in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
        assert keyed.call(method, path + further, headers=bearer("beta"))[0] == 404
    assert keyed.call("GET", path, headers=bearer("alpha"))[1]["status"] == "queued"
    assert keyed.call("GET", "/v1/videos", headers=bearer("beta"))[1]["data"] == []
    assert keyed.call("GET", f"/v1/videos?after={job['id']}", headers=bearer("beta"))[0] == 400
    key = {"Idempotency-Key": "shared"}
    _, first, _ = keyed.call("POST", "/v1/videos", {"prompt": "a"}, {**bearer("alpha"), **key})
    status, second, _ = keyed.call("POST", "/v1/videos", {"prompt": "b"}, {**bearer("beta"), **key})
    assert status == 200
    assert first["id"] != second["id"]
    status, answer, _ = keyed.call("POST", "/v1/videos", {"prompt": "one too many"}, bearer("alpha"))
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    keyed.supervisor.held = False


def test_keys_are_kept_nowhere(keyed: Served) -> None:
    assert keyed.call("POST", "/v1/videos", {"prompt": "x"}, bearer("alpha"))[0] in (200, 429)
    folder = keyed.options.data_dir
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert digest("alpha")[:16].encode() in kept  # whose job it is
    assert b"alpha" not in kept
    assert digest("alpha").encode() not in kept


# Sizes.


def test_bodies_are_limited(images: Served) -> None:
    status, answer, _ = images.call("POST", NOW, b" " * (LIMIT + 1), {"Content-Type": "application/json"})
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert images.call("POST", NOW, b" " * LIMIT, {"Content-Type": "application/json"})[0] == 400


def test_bodies_without_a_length_are_limited(images: Served) -> None:
    with socket.create_connection(("127.0.0.1", images.port), WAIT_S) as sock:
        head = f"POST {NOW} HTTP/1.1\r\n{LOCAL}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode())
        piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(LIMIT // 0x10000 + 1):
            sock.sendall(piece)
        sock.sendall(b"0\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_target_that_is_a_whole_address(images: Served) -> None:
    def first(target: str) -> bytes:
        with socket.create_connection(("127.0.0.1", images.port), WAIT_S) as sock:
            sock.sendall(f"GET {target} HTTP/1.1\r\n{LOCAL}Connection: close\r\n\r\n".encode())
            return sock.recv(100)

    for target in ("http://localhost/health", "HTTP://localhost:1/v1/models?", "http://localhost"):
        assert first(target).startswith(b"HTTP/1.1 200 "), target
    for target in ("http://localhost/nothing", "ftp://localhost/health"):
        assert first(target).startswith(b"HTTP/1.1 404 "), target
    assert first("http://other.example/v1/models").startswith(b"HTTP/1.1 403 ")  # it replaces the header


def test_a_body_has_one_end(images: Served) -> None:
    with socket.create_connection(("127.0.0.1", images.port), WAIT_S) as sock:
        head = f"POST {NOW} HTTP/1.1\r\n{LOCAL}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode() + b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 400 ") == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "image": [' + b"1," * 20_000 + b"1]}",
        b'{"prompt": "x", "sigmas": [' + b'"a",' * 40_000 + b'"a"]}',
        b'{"prompt": "x", "extra_args": {"a": [' + b"{}," * 20_000 + b"{}]}}",
        b'{"prompt": "x", "' + b"abcdefgh" * 20_000 + b'": 1}',
    ],
    ids=["list", "values", "deep", "name"],
)
def test_errors_cost_little_memory(images: Served, body: bytes) -> None:
    def resident() -> int:
        fields = Path(f"/proc/{images.process.pid}/status").read_text().split()
        return int(fields[fields.index("VmHWM:") + 1]) * 1024

    before = resident()
    assert images.call("POST", NOW, body, {"Content-Type": "application/json"})[0] == 400
    assert resident() - before < 16 * len(body) + 32 * 1024**2


def test_forms_have_few_parts(images: Served) -> None:
    many = {f"field{number}": "x" for number in range(101)}
    data, kind = form(many)
    status, answer, _ = images.call("POST", NOW, data, {"Content-Type": kind})
    assert (status, answer["error"]["code"]) == (400, "invalid_form")
    assert edit(images, *[picture()] * 17)[0] == 400


# Pages of others, paths, and clients that are slow or go.


def test_pages_of_other_origins_start_nothing(images: Served) -> None:
    status, answer, headers = images.call("POST", NOW, {"prompt": "x"}, {"Origin": "https://evil.example"})
    assert (status, answer["error"]["code"]) == (403, "wrong_origin")
    assert "access-control-allow-origin" not in headers
    for odd in ("null", "http://[", "x", ""):
        assert images.call("POST", NOW, {"prompt": "x"}, {"Origin": odd})[0] == 403
    assert images.call("POST", NOW, {"prompt": "x"}, {"Origin": images.url})[0] == 200


def test_foreign_host_names_are_refused(images: Served) -> None:
    for host in ("evil.example:8091", "evil.example", "localhost.evil.example"):
        status, answer, _ = images.call("GET", "/v1/images", headers={"Host": host})
        assert (status, answer["error"]["code"]) == (403, "wrong_host")
        assert f"--cors-origin http://{host.partition(':')[0]}" in answer["error"]["message"]
    status, answer, _ = images.call("GET", "/v1/images", headers={"Host": ""})
    assert (status, answer["error"]["message"]) == (403, "the header Host is missing; send it, or use an API key")
    for host in ("localhost:8091", "127.0.0.1", "[::1]:8091"):
        assert images.call("GET", "/v1/images", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize(
    "head", ["HTTP/1.0", "HTTP/1.1", "HTTP/1.1\r\nHost: shardit.default.svc:8091", "HTTP/1.0\r\nUser-Agent: probe"]
)
def test_probes_need_no_name(images: Served, path: str, head: str) -> None:
    for method in ("GET", "HEAD"):
        assert answer_to(images, f"{method} {path} {head}\r\n\r\n").split()[1] == b"200"
    stranger = answer_to(images, f"GET /ready {head}\r\n\r\n")
    assert b'"ranks":[]' in stranger or head == "HTTP/1.1"
    other = answer_to(images, f"GET /v1/images {head}\r\n\r\n")
    assert other.split()[1] in (b"400", b"403")


def answer_to(served: Served, request: str) -> bytes:
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as client:
        client.sendall(request.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode())
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_origins_can_be_allowed(tmp_path: Path) -> None:
    with serving(tmp_path, cors_origins=("https://good.example",), api_key_hashes=(digest("alpha"),)) as served:
        good = {"Origin": "https://good.example"}
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        status, _, headers = served.call("OPTIONS", NOW, headers={**good, **ask})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://good.example")
        status, _, headers = served.call("POST", NOW, {"prompt": "x"}, {**good, **bearer("alpha")})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://good.example")
        assert {"Retry-After", "openai-poll-after-ms"} <= set(headers["access-control-expose-headers"].split(", "))
        # OpenAI's client for JavaScript adds headers of its own, which a browser asks for first.
        ask["Access-Control-Request-Headers"] = "authorization,openai-organization,x-stainless-lang"
        status, _, headers = served.call("OPTIONS", NOW, headers={**good, **ask})
        assert (status, headers["access-control-allow-headers"]) == (200, ask["Access-Control-Request-Headers"])
        assert served.call("OPTIONS", NOW, headers={"Origin": "https://evil.example", **ask})[0] == 400
        headers = served.call("GET", "/health", headers={"Origin": "https://evil.example"})[2]
        assert "access-control-allow-origin" not in headers


def test_names_of_uploads_reach_no_file(images: Served) -> None:
    status, answer = edit(images, picture())
    assert status == 200
    folder = images.store.files_of(answer["id"])
    assert sorted(path.name for path in folder.iterdir()) == ["input-0.png", "output.png"]


@pytest.mark.parametrize(
    "path", ["/../jobs.sqlite", "/%2e%2e/jobs.sqlite", "/page.py", "/..%5cjobs.sqlite", "//etc/passwd"]
)
def test_paths_lead_nowhere(images: Served, path: str) -> None:
    with socket.create_connection(("127.0.0.1", images.port), WAIT_S) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\n{LOCAL}Connection: close\r\n\r\n".encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 404 ")


def test_headers_of_answers_cannot_be_written_by_clients(images: Served) -> None:
    status, answer, headers = images.call("GET", "/v1/images/x%0d%0aEvil:%20yes")
    assert status == 404
    assert "evil" not in headers
    assert "\r" in answer["error"]["message"] or "\\r" in answer["error"]["message"]


def test_others_are_answered_while_clients_are_slow(images: Served) -> None:
    slow = []
    for number in range(60):
        sock = socket.create_connection(("127.0.0.1", images.port), WAIT_S)
        if number % 2:
            sock.sendall(f"POST {NOW} HTTP/1.1\r\n{LOCAL}Content-Length: 1000\r\n\r\nx".encode())
        else:
            sock.sendall(b"GET /health HTTP/1.1\r\nHo")
        slow.append(sock)
    try:
        assert images.call("GET", "/health")[0] == 200
        assert images.call("POST", NOW, {"prompt": "x", "size": "16x16"})[0] == 200
    finally:
        for sock in slow:
            sock.close()


@pytest.mark.full
def test_a_body_that_stops_is_given_up(images: Served) -> None:
    with socket.create_connection(("127.0.0.1", images.port), WAIT_S) as sock:
        head = f"POST {NOW} HTTP/1.1\r\n{LOCAL}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\nx"
        sock.sendall(head.encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.full
def test_a_head_that_stops_is_given_up(images: Served) -> None:
    with socket.create_connection(("127.0.0.1", images.port), 2 * WAIT_S) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHo")
        assert sock.recv(100) == b""


def test_invalid_http_is_logged(images: Served) -> None:
    with socket.create_connection(("127.0.0.1", images.port), WAIT_S) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
    lines = [json.loads(line) for line in images.log.read_text().splitlines()]
    assert any(line.get("text") == "Invalid HTTP request received." for line in lines)


def test_clients_that_go_at_any_moment_leave_nothing(images: Served) -> None:
    body = json.dumps({"prompt": "slow", "size": "16x16"}).encode()
    head = f"POST {NOW} HTTP/1.1\r\n{LOCAL}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    whole = head.encode() + body
    for end in (5, len(head), len(whole) - 1, len(whole)):
        with socket.create_connection(("127.0.0.1", images.port), WAIT_S) as sock:
            sock.sendall(whole[:end])
            if end == len(whole):
                time.sleep(0.1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
    until = time.monotonic() + WAIT_S
    while {"queued", "in_progress"} & set(images.store.counts()):
        assert time.monotonic() < until, images.store.counts()
        time.sleep(0.05)
    assert images.call("GET", "/health")[0] == 200


def test_files_that_are_open_stay_few(images: Served) -> None:
    folder = Path(f"/proc/{images.process.pid}/fd")
    if not folder.is_dir():
        pytest.skip("this system has no /proc")
    until = time.monotonic() + WAIT_S
    while len(os.listdir(folder)) > 60:
        assert time.monotonic() < until, os.listdir(folder)
        time.sleep(0.1)
