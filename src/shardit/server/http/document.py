"""The OpenAPI document: what FastAPI cannot see by itself, and what it gets wrong."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic import BaseModel

_FILE = {"type": "string", "format": "binary"}

PREFER: dict[str, Any] = {
    "parameters": [
        {
            "name": "Prefer",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "respond-async: answer 202 with a job at once.",
        }
    ]
}


class EventStream(Response):
    """Server-sent events."""

    media_type = "text/event-stream"


EVENTS: dict[str, Any] = {"response_class": EventStream}


def binary(media_type: str) -> dict[str, Any]:
    """Arguments of a route whose answer is a file."""
    file = type("File", (Response,), {"media_type": media_type})
    return {"response_class": file}


def body_of(model: type[BaseModel], uploads: tuple[str, ...] = ("image", "image[]")) -> dict[str, Any]:
    """The request body that `model` checks, as JSON and as a multipart form with files."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    form = {**schema, "title": f"{model.__name__}Form", "properties": dict(schema["properties"])}
    for name, field in form["properties"].items():
        if "anyOf" in field:  # a form says null by an empty part
            form["properties"][name] = {**field, "anyOf": [*field["anyOf"], {"const": ""}]}
    for name in ("image", "input_reference", *uploads):
        form["properties"].pop(name, None)
    for name in uploads:
        many = name.endswith("[]")
        form["properties"][name] = {"type": "array", "items": _FILE} if many else _FILE
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
        }
    }


def describe(app: FastAPI, models: tuple[type[BaseModel], ...]) -> None:
    """Make `app` give a corrected document; `models` are added to its components."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _corrected(
                get_openapi(title=app.title, version=app.version, routes=app.routes), models
            )
        return app.openapi_schema

    app.openapi = openapi  # pyright: ignore[reportAttributeAccessIssue]


def _corrected(document: dict[str, Any], models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # every mistake is answered with 400 here
            for status, answer in operation["responses"].items():
                if "text/event-stream" in answer.get("content", {}):
                    answer["content"]["text/event-stream"] = {}  # not one text, but one after the other
                if int(status) >= 400:  # errors are JSON where results are files, too
                    answer["content"] = {"application/json": next(iter(answer["content"].values()))}
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in models:
        schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
