"""Tools of a request: their check, which of them the model must call, and the grammar that makes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from shardit.errors import InputError
from shardit.language.grammar.grammars import check_form, json_rule, quoted
from shardit.language.request.structured_outputs import StructuredOutputsParams
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.texts.tool_calls import BEGIN, END

MOST_CALLS = 16
"""Calls of one answer that `tool_choice` enforces, at most."""

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def check_tools(values: Mapping[str, Any]) -> None:
    """Raise ApiError for tools, or a choice of them, that a request cannot have."""
    tools, choice = values.get("tools") or [], values.get("tool_choice", "auto")
    names: list[str] = []
    for number, tool in enumerate(tools):
        given = tool.get("function") if tool.get("type") == "function" else None
        function: dict[str, Any] = given if isinstance(given, dict) else {}
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in names:
            text = (
                f'must be {{"type": "function", "function": {{"name": ...}}}} with a name of its own, got {tool!r:.80}'
            )
            raise ApiError(400, f"tools[{number}] {text}", code="invalid_value", param="tools")
        if not isinstance(function.get("parameters") or {}, dict):
            text = f"tools[{number}].function.parameters must be a JSON schema, got {function['parameters']!r:.80}"
            raise ApiError(400, text, code="invalid_value", param="tools")
        names.append(name)
    if choice in ("none", "auto"):
        return
    if not tools:
        raise ApiError(400, "tool_choice needs tools; give them", code="invalid_value", param="tool_choice")
    if (wanted := _chosen(choice)) is not None and wanted not in names:
        text = f"tool_choice names the function {wanted!r}; tools has: {', '.join(names)}"
        raise ApiError(400, text, code="invalid_value", param="tool_choice")


def _chosen(choice: Any) -> str | None:
    return choice["function"]["name"] if isinstance(choice, dict) else None


def is_forced(values: Mapping[str, Any]) -> bool:
    """Return whether the answer must call a tool."""
    return values.get("tool_choice", "auto") not in ("none", "auto")


def call_form(values: Mapping[str, Any]) -> StructuredOutputsParams:
    """Return the form of an answer that calls the tools that `tool_choice` names, or any of them."""
    wanted = _chosen(values["tool_choice"])
    functions = [one["function"] for one in values["tools"] if wanted in (None, one["function"]["name"])]
    one_call = wanted is not None or values.get("parallel_tool_calls") is False
    rules = ["start: call" if one_call else f'start: call ("\\n" call){{0,{MOST_CALLS - 1}}}']
    rules.append(f"call: {' | '.join(f'call{number}' for number in range(len(functions)))}")
    for number, function in enumerate(functions):
        head = f'{BEGIN}\n{{"name": {json.dumps(function["name"])}, "arguments": '
        rules.append(f"call{number}: {quoted(head)} arguments{number} {quoted('}' + chr(10) + END)}")
        rules.append(f"arguments{number}: {json_rule(_schema(function))}")
    return StructuredOutputsParams(grammar="\n".join(rules))


def check_call_form(values: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise ApiError if the arguments of a tool that must be called cannot be enforced; it names the place."""
    for number, tool in enumerate(values["tools"]):
        try:
            check_form(StructuredOutputsParams(json=_schema(tool["function"])), tokenizer)
        except InputError as error:
            place = f"tools[{number}].function.parameters"
            text = str(error).replace("structured_outputs.json", place, 1)
            raise ApiError(400, text, code="invalid_value", param="tools") from error


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **(function.get("parameters") or {})}


def has_calls(values: Mapping[str, Any], tokenizer: Any) -> bool:
    """Return whether calls of tools are looked for in the answer: if they are enforced, or the chat template shows
    the form of them that is known here."""
    if not values.get("tools") or values.get("tool_choice") == "none":
        return False
    return is_forced(values) or BEGIN in str(tokenizer.chat_template)
