"""Input images of a request: uploads, data: URLs, and addresses on trusted hosts."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from shardit.server.http.schema.errors import ApiError
from shardit.server.http.schema.fields import IMAGES
from shardit.server.http.submit.body import Body
from shardit.server.http.submit.fetch import fetch
from shardit.server.options import ServeOptions


def input_images(values: Mapping[str, Any], body: Body, options: ServeOptions) -> list[tuple[str, bytes]]:
    """Return all input images, each with the name of its field, in order. Blocks while it fetches. Raises
    ApiError."""
    found: list[tuple[str, bytes]] = []
    for name in IMAGES:
        found += [(name, data) for data in body.uploads.get(name, ())]
        given = values.get(name)
        for source in given if isinstance(given, list) else [] if given is None else [given]:
            url = source["image_url"] if isinstance(source, dict) else source
            found.append((name, _read(url, name, options)))
    if len(found) > options.limits.input_images:
        name, most = found[-1][0], options.limits.input_images
        text = f"{name}: there are {len(found)} input images, the limit is {most}; give fewer"
        raise ApiError(400, text, code="too_many_images", param=name)
    return found


def _read(url: str, name: str, options: ServeOptions) -> bytes:
    if url.startswith("data:"):
        return _from_data_url(url, name)
    if url.startswith(("https://", "http://")) and options.fetch_hosts:
        return fetch(url, options.fetch_hosts, options.limits.body_bytes, name)
    text = f"{name} must be a data: URL (data:image/png;base64,...) or an upload; this server fetches no addresses"
    raise ApiError(400, text, code="invalid_image", param=name)


def _from_data_url(url: str, name: str) -> bytes:
    head, comma, encoded = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ApiError(400, f"{name} must be base64: data:image/png;base64,...", code="invalid_image", param=name)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{name} is not valid base64: {error}", code="invalid_image", param=name) from error
