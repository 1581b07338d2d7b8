"""Who may do what, how large a request may be, and what becomes of hostile ones."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from shardit.server.http import fetch
from shardit.server.http.errors import ApiError
from shardit.server.http.pictures import check_picture
from shardit.server.keys import digest
from shardit.server.options import Limits

from .http_fake import IMAGE, VIDEO, WAIT_S, Served, form, picture, serving

NOW = "/v1/images/generations"
LIMIT = 200_000

LOCAL = "Host: localhost\r\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = Limits(body_bytes=LIMIT, pixels=160 * 128)  # what a tiny model makes by itself
    with serving(tmp_path_factory.mktemp("images"), IMAGE, limits=limits, queue_size=100_000) as served:
        yield served


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    hashes = (digest("alpha"), digest("beta"))
    limits = Limits(jobs_per_key=2)
    folder = tmp_path_factory.mktemp("keyed")
    with serving(folder, VIDEO, api_key_hashes=hashes, limits=limits) as served:
        yield served


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def edit(served: Served, *files: bytes, **fields: Any) -> tuple[int, Any]:
    data, kind = form({"prompt": "brighter", **fields, "image[]": [("../../x.png", file) for file in files]})
    return served.call("POST", "/v1/images/edits", data, {"Content-Type": kind})[:2]


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


def test_jobs_of_others_are_not_there(keyed: Served) -> None:
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


# Pictures.


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + struct.pack("<I", width - 1)[:3]
        + struct.pack("<I", height - 1)[:3]
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_good_pictures(images: Served, kind: str) -> None:
    status, answer = edit(images, picture((40, 30), kind))
    assert status == 200, answer
    job = images.store.get(answer["id"])
    assert job is not None
    assert job.facts["input_sizes"] == [[40, 30]]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + bytes(100),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0" + bytes(50),
        b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(4),
        picture()[:-30],
        picture(kind="JPEG")[:-100],
        picture((90, 90), "WEBP")[:-20],
        png_header(205, 100),
        png_header(60_000, 60_000),
        webp_header(16_384, 16_384),
        picture((205, 100)),
        picture((205, 100), "WEBP"),
        picture((205, 100), "JPEG"),
    ],
    ids=range(15),
)
def test_bad_pictures(images: Served, data: bytes) -> None:
    began = time.monotonic()
    status, answer = edit(images, data)
    assert (status, answer["error"]["param"]) == (400, "image")
    assert answer["error"]["code"] in ("invalid_image", "too_large")
    assert time.monotonic() - began < WAIT_S


def test_other_formats_of_pillow_are_never_tried() -> None:
    for kind in ("BMP", "TIFF", "GIF", "ICO", "PPM"):
        with pytest.raises(ApiError, match="PNG, JPEG or WebP"):
            check_picture(picture(kind=kind), Limits(), "image")


@pytest.mark.parametrize("lossless", [False, True])
def test_sizes_of_webp_are_read_without_decoding(lossless: bool) -> None:
    into = io.BytesIO()
    Image.new("RGB", (123, 45), "red").save(into, "WEBP", lossless=lossless)
    assert check_picture(into.getvalue(), Limits(pixels=123 * 45), "image") == "webp"
    with pytest.raises(ApiError, match="123x45"):
        check_picture(into.getvalue(), Limits(pixels=123 * 45 - 1), "image")


@settings(max_examples=150, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 2**32), st.integers(1, 8))
def test_damaged_pictures_are_refused_or_good(kind: str, seed: int, count: int) -> None:
    draw, data = random.Random(seed), bytearray(picture((20, 20), kind))
    for _ in range(count):
        data[draw.randrange(len(data))] = draw.randrange(256)
    # Nothing but an ApiError may come.
    with contextlib.suppress(ApiError):
        check_picture(bytes(data[: draw.randrange(1, len(data) + 1)]), Limits(pixels=10_000), "image")


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6))
def test_damaged_forms_are_refused_or_good(images: Served, seed: int, count: int) -> None:
    draw = random.Random(seed)
    body, kind = form({"prompt": "x", "size": "16x16", "sigmas[]": ["1", "0.5"], "image": ("a.png", picture((8, 8)))})
    data = bytearray(body)
    for _ in range(count):
        start = draw.randrange(len(data))
        match draw.randrange(3):
            case 0:
                data[start] = draw.randrange(256)
            case 1:
                del data[start : start + draw.randrange(20)]
            case _:
                data[start:start] = draw.choice([b"\r\n--limit", b'name="', b"\x00", b"\xff\xfe", b"[]", b"--"])
    status, _, _ = images.call("POST", "/v1/images/edits", bytes(data), {"Content-Type": kind})
    assert status in (200, 400), data
    assert images.process.poll() is None


# Addresses.


def test_data_urls(images: Served) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    for given_as in (url, [url, url], {"image_url": url}):
        status, answer, _ = images.call("POST", "/v1/images/edits", {"prompt": "x", "image": given_as})
        assert status == 200, answer


def test_no_address_is_fetched(images: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        assert images.call("POST", "/v1/images/edits", {"prompt": "x", "image": url})[0] == 400
        with pytest.raises(TimeoutError):
            trap.accept()


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


# Pages of others, paths, and clients that are slow or go.


def test_pages_of_other_origins_start_nothing(images: Served) -> None:
    status, answer, headers = images.call("POST", NOW, {"prompt": "x"}, {"Origin": "https://evil.example"})
    assert (status, answer["error"]["code"]) == (403, "wrong_origin")
    assert "access-control-allow-origin" not in headers
    for odd in ("null", "http://[", "x", ""):
        assert images.call("POST", NOW, {"prompt": "x"}, {"Origin": odd})[0] == 403
    assert images.call("POST", NOW, {"prompt": "x"}, {"Origin": images.url})[0] == 200


def test_names_of_others_that_point_here(images: Served) -> None:
    for host in ("evil.example:8091", "evil.example", "localhost.evil.example"):
        status, answer, _ = images.call("GET", "/v1/images", headers={"Host": host})
        assert (status, answer["error"]["code"]) == (403, "wrong_host")
    for host in ("localhost:8091", "127.0.0.1", "[::1]:8091"):
        assert images.call("GET", "/v1/images", headers={"Host": host})[0] == 200


def test_origins_can_be_allowed(tmp_path: Path) -> None:
    with serving(tmp_path, cors_origins=("https://good.example",), api_key_hashes=(digest("alpha"),)) as served:
        good = {"Origin": "https://good.example"}
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        status, _, headers = served.call("OPTIONS", NOW, headers={**good, **ask})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://good.example")
        status, _, headers = served.call("POST", NOW, {"prompt": "x"}, {**good, **bearer("alpha")})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://good.example")
        assert "Retry-After" in headers["access-control-expose-headers"]
        headers = served.call("GET", "/health", headers={"Origin": "https://evil.example"})[2]
        assert "access-control-allow-origin" not in headers


def test_names_of_uploads_reach_no_file(images: Served) -> None:
    status, answer = edit(images, picture())
    assert status == 200
    folder = images.store.files_of(answer["id"])
    assert sorted(path.name for path in folder.iterdir()) == ["input-0.png", "out.png"]


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


def test_what_is_no_http_is_a_line_of_the_log(images: Served) -> None:
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
