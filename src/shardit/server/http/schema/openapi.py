"""Completes and corrects FastAPI's OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic import BaseModel

_REFERENCE = "#/components/schemas/{model}"
FILE = {"type": "string", "format": "binary"}
"""The schema of a file."""

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


def binary(media_type: str) -> dict[str, Any]:
    """Return the arguments of a route whose answer is a file."""
    file = type("File", (Response,), {"media_type": media_type})
    return {"response_class": file}


def body(name: str) -> dict[str, Any]:
    """Return the arguments of a route with a body from the `bodies` of `describe`."""
    return {"requestBody": {"$ref": f"#/components/requestBodies/{name}"}}


def _body_of(model: type[BaseModel], uploads: tuple[str, ...]) -> dict[str, Any]:
    """Return the request body checked by `model`, as JSON and as a multipart form with files."""
    schema = model.model_json_schema(ref_template=_REFERENCE)
    schema.pop("$defs", None)
    form = {**schema, "title": f"{model.__name__}Form", "properties": dict(schema["properties"])}
    for name, field in form["properties"].items():
        if "anyOf" in field:  # an empty part of a form means null
            form["properties"][name] = {**field, "anyOf": [*field["anyOf"], {"const": ""}]}
    for name in ("image", "input_reference", *uploads):
        form["properties"].pop(name, None)
    for name in uploads:
        many = name.endswith("[]")
        form["properties"][name] = {"type": "array", "items": FILE} if many else FILE
    return {
        "required": True,
        "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
    }


def _json_body_of(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=_REFERENCE)
    schema.pop("$defs", None)
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def describe(
    app: FastAPI,
    models: tuple[type[BaseModel], ...],
    bodies: Mapping[str, tuple[type[BaseModel], tuple[str, ...]]],
    jsons: Mapping[str, type[BaseModel]],
) -> None:
    """Make `app` return a corrected document. It is built on first use, as that takes a while.

    models: additions to the schemas. bodies: by name, the model of each body and the names of its uploads. jsons: by
    name, the models of bodies that are JSON only.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = _corrected(get_openapi(title=app.title, version=app.version, routes=app.routes), models)
            made = {name: _body_of(*parts) for name, parts in bodies.items()}
            made |= {name: _json_body_of(model) for name, model in jsons.items()}
            document["components"]["requestBodies"] = made
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # pyright: ignore[reportAttributeAccessIssue]


def _corrected(document: dict[str, Any], models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # every mistake is answered with 400 here
            for status, answer in operation["responses"].items():
                if "text/event-stream" in answer.get("content", {}):
                    answer["content"]["text/event-stream"] = {}  # a sequence of texts, not one text
                if int(status) >= 400:  # errors are JSON even if results are files
                    answer["content"] = {"application/json": next(iter(answer["content"].values()))}
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in models:
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
