"""Messages as chat templates expect them, made of the forms in which clients and data sets have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shardit.errors import InputError

_EMPTY_KEYS = ("refusal", "annotations", "audio", "function_call", "tool_calls", "name")
"""Keys of answers that clients and data sets have without a content."""


def plain_messages(messages: Any) -> Any:
    """Return messages with each content as one text, and the arguments of tool calls as objects: templates write a
    list, or a text in JSON, as Python or JSON shows it. What is no message is returned as it is. Raises InputError for
    parts of a content that are no text."""
    if not isinstance(messages, (list, tuple)):
        return messages
    return [_plain(one, f"messages[{number}]") for number, one in enumerate(messages)]


def _plain(message: Any, where: str) -> Any:
    if not isinstance(message, Mapping):
        return message
    kept = {name: value for name, value in message.items() if value or name not in _EMPTY_KEYS}
    content = kept.get("content")
    if isinstance(content, (list, tuple)):
        kept["content"] = "".join(_text_of(part, f"{where}.content[{number}]") for number, part in enumerate(content))
    if isinstance(calls := kept.get("tool_calls"), (list, tuple)):
        kept["tool_calls"] = [_with_arguments(one, f"{where}.tool_calls[{number}]") for number, one in enumerate(calls)]
        kept["content"] = kept.get("content") or ""  # templates add texts to it, or look whether it is empty
    return kept


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise InputError(f'{where} must be {{"type": "text", "text": ...}}: this model takes text only, got {part!r:.80}')


def _with_arguments(call: Any, where: str) -> Any:
    """Return a call of a tool with its arguments as an object, as chat templates expect them; OpenAI has JSON in a
    text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(
            f'{where} must be {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}, got {call!r:.80}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InputError(f"{where}.function.arguments must be JSON, got {arguments!r:.80}") from None
    return {**call, "function": {**function, "arguments": arguments}}
