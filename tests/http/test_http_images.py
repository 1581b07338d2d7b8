"""Uploaded pictures, hostile and damaged ones too, and damaged forms around them."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from shardit.server.http.schema.errors import ApiError
from shardit.server.http.submit.image_checks import check_header, check_whole
from shardit.server.options import RequestLimits
from tests.support.http_calls import edit
from tests.support.http_fake import IMAGE, WAIT_S, Served, form, picture, serving


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = RequestLimits(pixels=160 * 128)  # what a tiny model makes by itself
    with serving(tmp_path_factory.mktemp("images"), IMAGE, limits=limits, queue_size=100_000) as served:
        yield served


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
    assert job.details["input_sizes"] == [[40, 30]]


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
            check_header(picture(kind=kind), RequestLimits(), "image")


@pytest.mark.parametrize("lossless", [False, True])
def test_sizes_of_webp_are_read_without_decoding(lossless: bool) -> None:
    into = io.BytesIO()
    Image.new("RGB", (123, 45), "red").save(into, "WEBP", lossless=lossless)
    assert check_header(into.getvalue(), RequestLimits(pixels=123 * 45), "image") == "webp"
    with pytest.raises(ApiError, match="123x45"):
        check_header(into.getvalue(), RequestLimits(pixels=123 * 45 - 1), "image")


@settings(max_examples=150, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 2**32), st.integers(1, 8))
def test_damaged_pictures_are_refused_or_good(kind: str, seed: int, count: int) -> None:
    draw, data = random.Random(seed), bytearray(picture((20, 20), kind))
    for _ in range(count):
        data[draw.randrange(len(data))] = draw.randrange(256)
    # Nothing but an ApiError may come.
    with contextlib.suppress(ApiError):
        damaged = bytes(data[: draw.randrange(1, len(data) + 1)])
        check_header(damaged, RequestLimits(pixels=10_000), "image")
        check_whole(damaged, "image")


def test_pictures_that_pil_takes_for_an_attack_are_too_large():
    into = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(into, "PNG")
    with pytest.raises(ApiError, match="image has far more pixels than the limit") as refused:
        check_header(into.getvalue(), RequestLimits(), "image")
    assert refused.value.code == "too_large"


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
