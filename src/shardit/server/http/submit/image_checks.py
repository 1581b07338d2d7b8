"""Checks uploaded images before decoding, then decodes them once to ensure that they are complete."""

from __future__ import annotations

import io
import struct

from PIL import Image

from shardit.diffusion.request.images import open_image
from shardit.errors import InputError
from shardit.server.http.schema.errors import ApiError
from shardit.server.options import RequestLimits

_FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


def check_header(data: bytes, limits: RequestLimits, param: str) -> str:
    """Return the file extension of an image, without decoding it.

    Raises ApiError (400) for anything but a PNG, JPEG or WebP of at most `limits.pixels`.
    """
    kind = _format_of(data)
    if kind is None:
        raise _refused(param, "is not a PNG, JPEG or WebP file; give one of these")
    try:
        width, height = _size(data, kind)
    except Image.DecompressionBombError as error:
        text = f"has far more pixels than the limit; give an image of 1 to {limits.pixels} pixels"
        raise _refused(param, text, "too_large") from error
    except Exception as error:  # decoders raise nearly any exception on damaged data
        raise _refused(param, "cannot be read, its header is damaged; save it again") from error
    if width < 1 or height < 1 or width * height > limits.pixels:
        text = f"has {width}x{height} pixels; give an image of 1 to {limits.pixels} pixels"
        raise _refused(param, text, "too_large")
    return _FORMATS[kind]


def check_whole(data: bytes, param: str) -> None:
    """Decode an image once, after `check_header`. Takes time and memory: call it in a thread, one at a time.

    Raises ApiError (400) if it is damaged.
    """
    try:
        open_image(data)
    except InputError as error:
        raise _refused(param, f"cannot be used: {error}") from error
    except MemoryError as error:
        raise _refused(param, "does not fit the memory; give a smaller image", "too_large") from error


def _format_of(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _size(data: bytes, kind: str) -> tuple[int, int]:
    if kind == "WEBP":  # PIL would reserve memory for the whole image when it opens one
        return _webp_size(data)
    with Image.open(io.BytesIO(data), formats=[kind]) as image:  # reads the header only
        return image.size


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk, body = data[12:16], data[20:30]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L" and body[:1] == b"\x2f":
        (bits,) = struct.unpack("<I", body[1:5])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no known chunk")


def _refused(param: str, text: str, code: str = "invalid_image") -> ApiError:
    return ApiError(400, f"{param} {text}", code=code, param=param)
