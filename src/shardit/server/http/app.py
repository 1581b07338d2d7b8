"""The HTTP application: routes, errors in one format, and the middleware in front."""

from __future__ import annotations

import sqlite3
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from shardit import __version__
from shardit.logs import logger
from shardit.server.http.answers.waiting import ClientGone
from shardit.server.http.middleware import PROBED, HttpMiddleware
from shardit.server.http.routes.generations import generation_routes
from shardit.server.http.routes.images import image_routes
from shardit.server.http.routes.page import page_files, page_routes
from shardit.server.http.routes.server_info import server_info_routes
from shardit.server.http.routes.texts import text_routes
from shardit.server.http.routes.tokens import token_routes
from shardit.server.http.routes.videos import video_routes
from shardit.server.http.schema.errors import ApiError, ErrorBody, busy
from shardit.server.http.schema.fields import ImageUrl, field_models
from shardit.server.http.schema.openapi import describe
from shardit.server.http.state.context import Context
from shardit.server.http.state.live_state import LiveState
from shardit.server.http.state.metrics import HttpMetrics
from shardit.server.http.texts.fields import ResponseFormat, StreamOptions, text_fields
from shardit.server.http.texts.text_model import TextModel
from shardit.server.jobs.store import Store
from shardit.server.options import ServeOptions

_LOG = logger("api")
_OPEN = ("/health", "/ready", "/favicon.ico")


def create_app(options: ServeOptions, store: Store, live_state: LiveState) -> FastAPI:
    """Build the application; `live_state` must be updated in the event loop in which it runs."""
    texts = TextModel(options.model, options.loading.lora) if options.of_language else None
    fields = field_models(options.limits)
    context = Context(options, store, live_state, fields, HttpMetrics(), text_fields(), texts)
    checks = [Depends(_known_query)]
    app = FastAPI(
        title="shardit", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False, dependencies=checks
    )
    app.state.texts = texts
    files = page_files()
    routes = (image_routes, video_routes, generation_routes, text_routes, token_routes, server_info_routes)
    for router in (*(make(context) for make in routes), page_routes(files)):
        app.include_router(router)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    uploads = ("image", "image[]")
    bodies: dict[str, tuple[Any, tuple[str, ...]]] = {"image": (fields.image, uploads), "edit": (fields.edit, uploads)}
    bodies["video"] = (fields.video, ("input_reference", *uploads))
    bodies["generation"] = (fields.generation, uploads)
    of_texts = context.text_fields
    jsons = {"chat_completion": of_texts.chat, "completion": of_texts.completion}
    jsons |= {"tokenize": of_texts.tokenize, "detokenize": of_texts.detokenize}
    describe(app, (ImageUrl, ErrorBody, StreamOptions, ResponseFormat), bodies, jsons)
    app.add_middleware(
        HttpMiddleware, options=options, metrics=context.metrics, is_open=lambda path: path in _OPEN or path in files
    )
    if options.cors_origins:  # outermost, as a browser asks first whether it may, without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # OpenAI's clients add some of their own
            expose_headers=[
                "Location",
                "Retry-After",
                "X-Request-Id",
                "X-Shardit-Job",
                "X-Shardit-Notes",
                "X-Shardit-Seed",
                "openai-poll-after-ms",
            ],
        )
    return app


async def _known_query(request: Request) -> None:
    """Raise ApiError if the address has a query parameter that its route does not take."""
    route = request.scope["route"]
    if not isinstance(route, APIRoute) or not route.include_in_schema:  # the page
        return
    if route.path in PROBED:  # their clients may add one against caches
        return
    known = [field.alias for field in route.dependant.query_params]
    unknown = next((name for name in request.query_params if name not in known), None)
    if unknown is not None:
        takes = f"takes {', '.join(known)}" if known else "takes none"
        text = f"there is no query parameter {unknown!r}; {request.method} {route.path} {takes}"
        raise ApiError(400, text, code="unknown_parameter", param=unknown)
    twice = next((name for name in known if len(request.query_params.getlist(name)) > 1), None)
    if twice is not None:
        text = f"the query parameter {twice!r} is given twice; give it once"
        raise ApiError(400, text, code="invalid_value", param=twice)


async def _api_error(request: Request, error: Any) -> Response:
    return error.response()


async def _http_error(request: Request, error: Any) -> Response:
    known = {
        404: ("not_found", f"there is nothing at {request.url.path}"),
        405: ("method_not_allowed", f"{request.method} is not possible here; see the header Allow"),
    }
    code, text = known.get(error.status_code, ("http_error", str(error.detail)))
    headers = error.headers if error.status_code != 405 else {"Allow": _methods_of(request)}
    return ApiError(error.status_code, text, code=code, headers=headers).response()


def _methods_of(request: Request) -> str:
    """Return the methods of the path: each has a route of its own, of which Starlette names one."""
    route = request.scope["route"]
    path, described = route.path, request.app.openapi()["paths"]  # which leaves out the page
    found = {*route.methods, *map(str.upper, described.get(path, ()))}
    if "GET" in found and not path.endswith("/events"):  # as in `HttpMiddleware`
        found.add("HEAD")
    return ", ".join(sorted(found))


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return ApiError(400, f"{name} {first['msg'].removeprefix('Input ')}", code="invalid_value", param=name).response()


async def _storage(request: Request, error: Any) -> Response:
    _LOG.error("storage", error=str(error), http_id=request.scope["state"]["http_id"])
    return busy(f"the store of jobs cannot be used: {error}", 10, "storage").response()


async def _gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it; the number is for the log


_HANDLERS: dict[Any, Any] = {
    ApiError: _api_error,
    HTTPException: _http_error,
    RequestValidationError: _invalid,
    sqlite3.Error: _storage,
    ClientGone: _gone,
    ClientDisconnect: _gone,
}
