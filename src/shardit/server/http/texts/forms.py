"""The form that a text must have, from the fields of a request, and its check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardit.errors import InputError
from shardit.language.grammar.grammars import check_form
from shardit.language.request.structured_outputs import StructuredOutputsParams, structured_outputs_of
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.texts.tools import call_form, check_call_form, check_tools, is_forced

_SCHEMA = "response_format.json_schema.schema"


def form_of(values: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """Return the form that a request wants, None for any text. Raises ApiError."""
    wanted, own = values.get("response_format"), values.get("structured_outputs")
    check_tools(values)
    given = {
        "tool_choice": is_forced(values),
        "response_format": wanted is not None and wanted["type"] != "text",
        "structured_outputs": own is not None,
    }
    if len(names := [name for name in given if given[name]]) > 1:
        text = f"{names[0]} and {names[1]} both say what form the text has; give one of them"
        raise ApiError(400, text, code="invalid_value", param=names[1])
    if is_forced(values):
        return call_form(values)
    try:
        if own is not None:
            return structured_outputs_of(own)
        if wanted is None or wanted["type"] == "text":
            return None
        if wanted["type"] == "json_object":
            return StructuredOutputsParams(json_object=True)
        return StructuredOutputsParams(json=_schema_of(wanted))
    except InputError as error:
        raise _as_api_error(error, "structured_outputs") from error


def _schema_of(wanted: Mapping[str, Any]) -> Any:
    if wanted.get("json_schema") is None:
        text = f'{_SCHEMA} is missing: a response_format of type "json_schema" needs a JSON schema'
        raise ApiError(400, text, code="missing_field", param="response_format")
    return wanted["json_schema"]["schema"]


def check_form_of(form: StructuredOutputsParams | None, values: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise ApiError for a form that no text can have; it names the place in the request."""
    if form is None:
        return
    if is_forced(values):
        check_call_form(values, tokenizer)
    try:
        check_form(form, tokenizer)
    except InputError as error:
        own = values.get("structured_outputs") is not None
        param = "tools" if is_forced(values) else "structured_outputs" if own else "response_format"
        raise _as_api_error(error, param) from error


def _as_api_error(error: InputError, param: str) -> ApiError:
    text = str(error)
    if param == "tools":
        text = text.replace("structured_outputs.grammar", "tools", 1).replace("structured_outputs ", "tool_choice ", 1)
    elif param == "response_format":
        text = text.replace("structured_outputs.json", _SCHEMA, 1).replace("structured_outputs ", "response_format ", 1)
    return ApiError(400, text, code="invalid_value", param=param)
