"""Checks of every request before its route: a key if required, host and origin, the limits of size and time; and the
headers, metrics and log line of its answer. Plain ASGI, because answers are streams."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import secrets
import time
import traceback
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shardit.logs import logger
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.state.metrics import HttpMetrics
from shardit.server.keys import owner_of
from shardit.server.options import ServeOptions

_LOG = logger("api")
_BODY_IDLE_TIMEOUT_S = 30.0
"""Longest wait for the next piece of a body, in seconds."""
_BODY_TIMEOUT_S = 600.0
"""Time limit for a whole body, in seconds."""
_DRAIN_BYTES, _DRAIN_TIMEOUT_S = 1024**2, 2.0
_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")
_PROBES = ("/health", "/ready", "/metrics")
_POLLED = ("/v1/server", "/v1/images", "/v1/videos", "/v1/generations")
"""Routes that the page polls."""
PROBED = ("/health", "/ready")
"""Routes for probes, which may use another name for the server or none: they only report whether it works."""
_ABSOLUTE = re.compile(r"https?://([^/]+)", re.IGNORECASE)
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class HttpMiddleware:
    """Checks, counts and logs requests. is_open: returns whether a path needs no key."""

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: HttpMetrics, is_open: Callable[[str], bool]):
        self._app = app
        self._options = options
        self._metrics = metrics
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _in_plain_form(scope)
        began, seen, method = time.monotonic(), {"status": 0}, scope["method"]
        if method == "HEAD" and not scope["path"].endswith("/events"):
            scope = {**scope, "method": "GET"}  # the server below sends no body; streams of events would not end
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["http_id"] = request_id

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                _mark(MutableHeaders(scope=message), request_id, self._options.cors_origins)
            await send(message)

        self._metrics.open.inc()
        try:
            await self._answer(scope, receive, send_marked)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            _LOG.error("error", error=text, expected=False, http_id=request_id)
            if seen["status"]:  # the answer has begun: it can only be cut off
                raise
            answer = ApiError(500, "internal error: the log of the server has the details", code="internal_error")
            await answer.response()(scope, receive, send_marked)
        finally:
            self._metrics.open.dec()
            self._account(scope, method, seen["status"], time.monotonic() - began, request_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self._options.limits.body_bytes)
        try:
            self._check(scope)
        except ApiError as error:
            if error.status == 413:
                await body.drain()
            await error.response()(scope, receive, send)
            return
        await self._app(scope, body.receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
        except ApiError:
            if scope["path"] not in PROBED:
                raise
            scope["state"]["unverified_host"] = True
        if not self._is_open(scope["path"]):
            scope["state"]["owner"] = self._owner(headers)
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            self._check_origin(headers)
        if "content-length" in headers and "transfer-encoding" in headers:  # proxies may see another end than we do
            text = "a body has either Content-Length or Transfer-Encoding; send one of them"
            raise ApiError(400, text, code="invalid_request", headers={"Connection": "close"})
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._options.limits.body_bytes:
            raise too_large(self._options.limits.body_bytes)

    def _owner(self, headers: Headers) -> str | None:
        if not self._options.api_key_hashes:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        found = owner_of(key.strip(), self._options.api_key_hashes) if scheme.lower() == "bearer" else None
        if found is None:
            text = "a valid API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found

    def _check_host(self, headers: Headers) -> None:
        # Without keys, everyone with access to this machine's loopback may use the server. A page of another site could
        # get it by a DNS name of its own that points here: so only host names are accepted that nobody else can own.
        if self._options.api_key_hashes or not _is_loopback(self._options.host):
            return
        name = _name_of(headers.get("host", ""))
        known = {_name_of(urlsplit(origin).netloc) for origin in self._options.cors_origins}
        if name != "localhost" and not _is_address(name) and name not in known:
            text = f"the name {name!r} is not known here; use 127.0.0.1, an API key, or --cors-origin http://{name}"
            if not name:
                text = "the header Host is missing; send it, or use an API key"
            raise ApiError(403, text, code="wrong_host")

    def _check_origin(self, headers: Headers) -> None:
        # A page of another site could otherwise have a visitor's browser start jobs on their own machine's server.
        origin = headers.get("origin")
        if origin is None or origin in self._options.cors_origins:
            return
        try:
            host = urlsplit(origin).netloc
        except ValueError:
            host = ""
        if not host or host != headers.get("host"):
            raise ApiError(403, f"requests from pages of {origin!r} are not allowed here", code="wrong_origin")

    def _account(self, scope: Scope, method: str, status: int, seconds: float, request_id: str) -> None:
        route: Any = scope.get("route")
        path = getattr(route, "path", "other")  # the pattern: there are few of them, as of methods
        counted = method if method in _METHODS else "other"
        self._metrics.requests.labels(counted, path, str(status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        polled = path in _PROBES or (method == "GET" and path in _POLLED)
        if polled and (status < 400 or status == 503):  # 503: not ready yet
            return  # polled all the time
        _LOG.info(
            "request",
            http_id=request_id,
            method=method,
            path=scope["path"],
            status=status,
            seconds=round(seconds, 4),
            owner=scope["state"].get("owner"),
            request_id=scope["state"].get("job"),
        )


def _in_plain_form(scope: Scope) -> Scope:
    """Return the scope of a request whose target is a whole address, which a server must take (RFC 9112, 3.2.2), as if
    it were a path; its host replaces the header."""
    target = _ABSOLUTE.match(scope["path"])
    if target is None:
        return scope
    others = [pair for pair in scope["headers"] if pair[0] != b"host"]
    path = scope["path"][target.end() :] or "/"
    return {**scope, "path": path, "headers": [(b"host", target[1].encode()), *others]}


def _name_of(netloc: str) -> str:
    """Return the host of "host:port" or "[v6]:port", in lower case."""
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0]
    return netloc.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def too_large(limit: int) -> ApiError:
    """Return the error for a body that is longer than the limit."""
    text = f"the request is larger than {limit} bytes; send less"
    return ApiError(413, text, code="request_too_large", headers={"Connection": "close"})


def _mark(headers: MutableHeaders, request_id: str, cors: tuple[str, ...]) -> None:
    headers["X-Request-Id"] = request_id
    for name, value in _SAFE.items():
        if not (cors and name == "Cross-Origin-Resource-Policy"):
            headers.setdefault(name, value)
    headers.setdefault("Cache-Control", "private, no-store")
    headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; sandbox")


class _Body:
    """Reads the pieces of a body with limits of size and time."""

    def __init__(self, receive: Receive, limit: int):
        self._receive = receive
        self._limit = limit
        self._total = 0
        self._complete = False
        self._until = time.monotonic() + _BODY_TIMEOUT_S

    async def receive(self) -> Message:
        """Receive as ASGI's `receive`. Raises ApiError for a body that is too large or too slow."""
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), min(_BODY_IDLE_TIMEOUT_S, self._until - time.monotonic()))
        except (TimeoutError, asyncio.TimeoutError):
            self._complete = True
            limits = f"a pause of {_BODY_IDLE_TIMEOUT_S:g} s, or {_BODY_TIMEOUT_S:g} s in all"
            text = f"the body came too slowly ({limits}); send it again"
            raise ApiError(408, text, code="timeout", headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            self._total += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._total > self._limit:
                await self.drain()
                raise too_large(self._limit)
        else:
            self._complete = True
        return message

    async def drain(self) -> None:
        """Read a little more of a refused body: a client that is still sending would miss the answer."""
        left, until = _DRAIN_BYTES, time.monotonic() + _DRAIN_TIMEOUT_S
        while left > 0 and not self._complete:
            try:
                message = await asyncio.wait_for(self._receive(), max(0.01, until - time.monotonic()))
            except (TimeoutError, asyncio.TimeoutError):
                break
            left -= len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
