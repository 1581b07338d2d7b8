"""Parses the body of a request, JSON or multipart, into values and uploads; nothing longer than allowed is decoded."""

from __future__ import annotations

import json
import math
import re
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from shardit.server.http.schema.errors import ApiError
from shardit.server.http.schema.fields import IMAGES, NO_MEANING
from shardit.server.http.submit.forms import WholeForm
from shardit.server.options import RequestLimits

_MOST_FIELDS = 100
_MOST_DIGITS = 1000
"""Python itself refuses more than 4300, and advises a change of the server's code."""
_DEEPEST = 32
_MOST_ENTRIES = 10_000
"""Limit for one list or object. Each wrong entry would cost kilobytes for its error."""
_MOST_MARKS = 300_000
"""Limit for commas and opening brackets: a body is large because of its texts and images, not of countless values."""
_MOST_JSON = 16 * 1024**2
"""Limit for a body with texts only, in bytes: tokens are made one body after the other."""
_LONGEST_NAME = 256
_BRACKETS = re.compile(r"([a-z0-9_]+)\[([a-z0-9_]*)\]")
_TEXTS = re.compile(
    r"(negative_)?prompt(_[0-9])?|model|size|seconds|response_format|image|input_reference|user|safety_identifier"
)


@dataclass
class Body:
    """The parsed body of a request."""

    values: dict[str, Any] = field(default_factory=dict)
    """JSON values by field name."""
    uploads: dict[str, list[bytes]] = field(default_factory=dict)
    """Files by field name."""


async def read_body(request: Request, model: type[BaseModel], limits: RequestLimits) -> Body:
    """Read and parse the body. Raises ApiError."""
    _refuse_encoding(request)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        return Body(await run_in_threadpool(_parse_json, await request.body()))  # may take a while
    if kind == "multipart/form-data":
        return await _read_form(request, limits)
    text = f"the content type {kind!r} is not taken here; use application/json or multipart/form-data"
    raise ApiError(415, text, code="unsupported_media_type")


async def read_json(request: Request) -> dict[str, Any]:
    """Read and parse a body that must be JSON, with lists of tokens of any length. Raises ApiError."""
    _refuse_encoding(request)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        text = f"the content type {kind!r} is not taken here; use application/json"
        raise ApiError(415, text, code="unsupported_media_type")
    data = await request.body()
    if len(data) > _MOST_JSON:
        text = f"the body is larger than {_MOST_JSON} bytes, which are more than any model has room for; send less"
        raise ApiError(413, text, code="request_too_large")
    return await run_in_threadpool(_parse_json, data, _MOST_MARKS)


def _refuse_encoding(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        text = f"the content encoding {encoding!r} is not taken here; send the body as it is"
        raise ApiError(415, text, code="unsupported_media_type")


def check_text(value: Any, depth: int = 0, most: int = _MOST_ENTRIES) -> None:
    """Raise ApiError for invalid text (lone halves of UTF-16 pairs), and for too deep or too long values, anywhere in a
    JSON value. most: entries of one list or object."""
    if depth > _DEEPEST:
        raise ApiError(400, f"the body is nested more than {_DEEPEST} deep; send it flat", code="invalid_json")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ApiError(
                400, "the body holds half a character (a lone surrogate); send valid text", code="invalid_json"
            ) from None
    elif isinstance(value, (list, dict)):
        if len(value) > most:
            text = f"the body holds a list or object of {len(value)} entries, the limit is {most}; send fewer"
            raise ApiError(400, text, code="invalid_json")
        if isinstance(value, dict):
            for name in value:
                check_text(name)
                if len(name) > _LONGEST_NAME:
                    raise ApiError(400, f"there is no field {name[:40]!r}...", code="unknown_field")
        for entry in value.values() if isinstance(value, dict) else value:
            check_text(entry, depth + 1, most)


def _load(text: str) -> Any:
    if sum(text.count(mark) for mark in ",[{") > _MOST_MARKS:
        raise ValueError("it holds too many values")
    return json.loads(
        text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_given_once
    )


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _given_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Raises ApiError if it has a name twice: JSON would drop the first silently."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            shown = name[:_LONGEST_NAME].encode(errors="replace").decode()
            text = f"{shown!r} is given twice in one JSON object; give it once"
            raise ApiError(400, text, code="invalid_json", param=shown)
        found[name] = value
    return found


def _parse_json(data: bytes, most: int = _MOST_ENTRIES) -> dict[str, Any]:
    try:
        values = _load(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deep"
        raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object, as in {...}", code="invalid_json")
    check_text(values, most=most)
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large a number")
    return value


async def _read_form(request: Request, limits: RequestLimits) -> Body:
    most_text = 4 * limits.prompt_chars + 4096
    try:
        async with aclosing(request.stream()) as stream:
            parser = WholeForm(
                request.headers,
                stream,  # pyright: ignore[reportArgumentType]
                max_files=limits.input_images,
                max_fields=_MOST_FIELDS,
                max_part_size=max(most_text, limits.body_bytes),
            )
            form = await parser.parse()
    except (MultiPartException, UnicodeDecodeError, ValueError, KeyError) as error:
        reason = error.message if isinstance(error, MultiPartException) else str(error)
        raise ApiError(400, f"the multipart body cannot be read: {reason}", code="invalid_form") from error
    try:
        return await _from_form(form)
    finally:
        await form.close()


async def _from_form(form: FormData) -> Body:
    body = Body()
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            plain = name.removesuffix("[]")
            if plain in NO_MEANING:
                raise ApiError(400, f"{plain} has no meaning here; leave it out", code="unsupported_value", param=plain)
            if plain not in IMAGES:
                files = ", ".join(IMAGES)
                text = f"{name!r} is no file field; files are: {files}; texts and numbers are sent as plain fields"
                raise ApiError(400, text, code="unknown_field", param=plain)
            body.uploads.setdefault(plain, []).append(await value.read())
        else:
            _put(body.values, name, value)
    check_text(body.values)
    return body


def _put(values: dict[str, Any], name: str, text: str) -> None:
    """Store one text part: `name`, `name[]` for an entry of a list, `name[key]` for one of a dict."""
    brackets = _BRACKETS.fullmatch(name)
    if brackets is None:
        if name in values:
            raise ApiError(400, f"{name} is given twice; give it once", code="invalid_form", param=name)
        values[name] = _value(name, text)
        return
    plain, key = brackets.groups()
    holder = values.setdefault(plain, {} if key else [])
    if isinstance(holder, list) and not key:
        holder.append(_value(plain, text))
    elif isinstance(holder, dict) and key and key not in holder:
        holder[key] = _value(key if plain == "extra_args" else plain, text)
    else:
        raise ApiError(400, f"{plain} is given twice; give it once", code="invalid_form", param=plain)


def _value(name: str, text: str) -> Any:
    if _TEXTS.fullmatch(name) and (text or name not in IMAGES):
        return text
    if not text:
        return None  # form libraries send null as empty text
    try:
        return _load(text)
    except (ValueError, RecursionError):
        return text  # the check of the field reports the error
