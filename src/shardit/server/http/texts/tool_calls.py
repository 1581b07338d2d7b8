"""Finds calls of tools in a text, also while it comes in pieces. The form is the one that templates of Hermes, Qwen and
others teach: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"


def _call_of(text: str) -> dict[str, Any] | None:
    """Return the function of a call: its name, and its arguments as JSON; None for a text that is no call."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments") or {}
    return {
        "name": found["name"],
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    }


@dataclass
class ParsedPiece:
    """The certain part of a piece: text, and calls in the format of OpenAI."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class ToolCalls:
    """The calls in one text. What may become the mark of a call is held back, and so is a call until it is complete;
    blanks around calls are no part of the text."""

    def __init__(self) -> None:
        self.count = 0
        self._held = ""
        self._inside = False
        self._blanks = ""  # before a call
        self._follows = False  # whether there is no text yet since the last call

    def add(self, piece: str, *, is_last: bool = False) -> ParsedPiece:
        """Take a piece; return what is certain with it, with the last one all."""
        self._held += piece
        found = ParsedPiece()
        while self._end_call(found) if self._inside else self._begin_call(found):
            pass
        if is_last:
            if self._inside and (call := _call_of(self._held)) is not None:
                self._emit(found, call)  # such as one whose end token came in place of its mark
            else:
                found.text += (self._blanks + BEGIN if self._inside else "") + self._held
            self._held, self._inside = "", False
        return found

    def _begin_call(self, found: ParsedPiece) -> bool:
        """Give the text before a call, or as much as is certain to be text; return whether there is a call."""
        held = self._held.lstrip() if self._follows else self._held
        before, mark, after = held.partition(BEGIN)
        text = (before if mark else before[: len(before) - _possible(before)]).rstrip()
        found.text += text
        self._follows = self._follows and not text
        if mark:
            self._held, self._inside, self._blanks = after, True, before[len(text) :]
        else:
            self._held = before[len(text) :]
        return bool(mark)

    def _end_call(self, found: ParsedPiece) -> bool:
        """Give a call that is complete; return whether it was."""
        body, mark, after = self._held.partition(END)
        if not mark:
            return False
        if (call := _call_of(body)) is not None:
            self._emit(found, call)
        else:
            found.text += f"{self._blanks}{BEGIN}{body}{END}"
        self._held, self._inside = after, False
        return True

    def _emit(self, found: ParsedPiece, function: dict[str, Any]) -> None:
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        found.calls.append({"index": self.count, **call})
        self.count += 1
        self._follows = True


def _possible(text: str) -> int:
    """Return the length of the end of a text that may become the mark of a call."""
    return next((count for count in range(min(len(text), len(BEGIN) - 1), 0, -1) if BEGIN.startswith(text[-count:])), 0)
