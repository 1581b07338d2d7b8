"""Types of the fields of requests, and the error for the first field with a wrong value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from shardit.server.http.schema.errors import ApiError


def _whole(value: Any) -> Any:
    # In JSON, 4.0 is a whole number.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole: Any = Annotated[int, BeforeValidator(_whole)]

Label: Any = Annotated[str, Field(max_length=512)]


def between(minimum: int, maximum: int) -> Any:
    """Return the type of whole numbers within limits."""
    return Annotated[Whole, Field(ge=minimum, le=maximum)]


def optional(kind: Any, description: str) -> tuple[Any, Any]:
    """Return a field that may be left out or null."""
    return kind | None, Field(None, description=description)


MODEL = optional(str, "The served model, which is also the default.")
PRIORITY = optional(between(-10, 10), "Each step is worth ten minutes of waiting.")


def model_of(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    """Return the model of a body with these fields and no others."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    return create_model(name, __config__=config, **fields)


def first_error(error: ValidationError, texts: Mapping[str, str], by_path: Collection[str] = ()) -> ApiError:
    """Return the error for the first field with a wrong value. texts: readable forms of types, by field. by_path:
    fields that are objects, in which the error names the wrong part."""
    problems: Sequence[Any] = error.errors(include_url=False, include_context=False)
    place = problems[0]["loc"]
    name = str(place[0]) if place else None
    if problems[0]["type"] == "missing" and len(place) == 1:
        return ApiError(400, f"{name} is missing; give it", code="missing_field", param=name)
    reasons = dict.fromkeys(item["msg"].removeprefix("Input ") for item in problems if item["loc"][:1] == (name,))
    shown = repr(problems[0]["input"])
    shown = shown if len(shown) <= 100 else shown[:100] + " ..."
    path = ".".join(map(str, place)) if name in by_path else name
    text = texts.get(name or "") or " or ".join(reasons)
    return ApiError(400, f"{path} {text}, got {shown}", code="invalid_value", param=name)
