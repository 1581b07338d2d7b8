"""Error responses in the format of OpenAI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from shardit.errors import InputError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MEANINGS = {
    400: "The request is wrong; `error.param` names the field where one is to blame.",
    401: "An API key is needed, or the one that was sent is not valid.",
    403: "The request comes from a page of another origin, which the server does not allow.",
    404: "There is no such thing, or it belongs to another key.",
    405: "This address knows other methods only; see the header Allow.",
    408: "The request did not arrive in time.",
    409: "The idempotency key was used for another request, or the job is not in a state for this.",
    413: "The request is larger than the server takes.",
    415: "The content type is none that is taken here.",
    416: "The range lies outside the file.",
    429: "The queue is full; the header Retry-After says when to come back, in seconds.",
    500: "The job failed, or the server had an internal error.",
    503: "The server cannot take this now; the header Retry-After says when to come back, in seconds.",
}


class ErrorDetail(BaseModel):
    """One error."""

    message: str = Field(description="One line: the error and its remedy.")
    type: str
    param: str | None = Field(description="The field with the error, if it is a single one.")
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer of 400 and above."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with this status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def detail(self) -> dict[str, Any]:
        """Return the error as in `ErrorDetail`."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": printable(str(self)), "type": kind, "param": self.param, "code": self.code}

    def response(self) -> JSONResponse:
        """Return the response for this error."""
        detail = self.detail()
        headers = self.headers
        if self.status in (409, 500):  # a retry does not help, but clients would try
            headers = {**headers, "x-should-retry": "false"}
        return JSONResponse({"error": detail}, self.status, headers)


def busy(message: str, retry_after_s: float, code: str, status: int = 503) -> ApiError:
    """Return an error that asks the client to retry later."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(max(1, round(retry_after_s)))})


def from_input_error(error: InputError, fields: Iterable[str]) -> ApiError:
    """Return the error for a user's mistake. Messages of checks begin with the name of the checked field, if it is one
    of `fields`."""
    first = str(error).split(" ", 1)[0].split("[", 1)[0].split("=", 1)[0].rstrip(":,")
    return ApiError(400, str(error), code="invalid_value", param=first if first in set(fields) else None)


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of these errors. They refer to the schema of `ErrorBody`; with the model itself
    FastAPI would build a hundred validators at the start."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}}}
    return {status: {"content": content, "description": _MEANINGS[status]} for status in statuses}


def printable(text: str) -> str:
    """Make a text sendable: invalid Unicode is replaced, and its length is limited."""
    text = text if len(text) <= 2000 else text[:2000] + " ..."
    return text.encode("utf-8", "replace").decode("utf-8")
