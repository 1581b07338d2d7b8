"""Conversion of conversations to tokens by the tokenizer's chat template, which drops in silence what it does not
know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardit.errors import InputError, did_you_mean
from shardit.language.request.plain_messages import plain_messages
from shardit.settings.checks import text_problem

_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
"""Keys of messages; a chat template may know others."""

_USUAL_ROLES = ("user", "assistant")
_MARK = "shardit-mark"


def conversations_of(messages: Any) -> list[Any]:
    """Return conversations as a list; a single conversation is also accepted. Raises InputError for anything else."""
    if not isinstance(messages, (list, tuple)):
        raise InputError(f"messages must be a list of dicts with role and content, got {messages!r:.80}")
    if not messages:
        raise InputError("the list of messages is empty; give at least one message")
    return [messages] if isinstance(messages[0], Mapping) else list(messages)


def tool_notes(tools: Sequence[Any] | None, template: Any) -> list[str]:
    """Return a note if a chat template drops the tools."""
    if not tools or "tools" in str(template):
        return []
    return ["the chat template of the model shows no tools: they are left out"]


def template_text(given: str | Path | None) -> str | None:
    """Return a chat template that is given as text, or as the path of a file with it. Raises InputError."""
    if given is None or (isinstance(given, str) and "{" in given):
        return given
    try:
        return Path(given).expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"chat_template is no template, and no file that can be read: {given!s:.80}") from error


def chat_tokens(
    tokenizer: Any,
    messages: Sequence[Any],
    template: str | None,
    tools: Sequence[Any] | None,
    add_generation_prompt: bool,
) -> list[int]:
    """Return the tokens of a conversation. add_generation_prompt: whether to append the start of an answer. Raises
    InputError for wrong messages, if the chat template refuses or drops them, or there is none."""
    if template is None and tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template: give chat_template, or a prompt to generate()")
    messages = plain_messages(messages)
    if problem := text_problem((messages, template, tools)):
        raise InputError(f"messages must be {problem}")
    _check_messages(messages, str(template or tokenizer.chat_template))
    options: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "chat_template": template,
        "tools": tools,
        "return_dict": False,
    }
    try:
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, **options)
    except Exception as error:  # templates raise any exception
        raise InputError(f"the chat template refuses the messages: {error}") from error
    usual = _USUAL_ROLES if template is None else ()
    for role in dict.fromkeys(one["role"] for one in messages if one["role"] not in usual):
        if _drops(tokenizer, messages, role, options):
            raise InputError(f"the chat template drops messages with the role {role!r}: give them another role")
    return tokens


def _check_messages(messages: Any, template: str) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(f"a conversation must be a list of messages that is not empty, got {messages!r:.80}")
    for number, one in enumerate(messages):
        what = f"messages[{number}]"
        if not isinstance(one, Mapping):
            raise InputError(f'{what} must be {{"role": ..., "content": ...}}, got {one!r:.80}')
        for key in one:
            if key not in _KEYS and not re.search(rf"\b{re.escape(str(key))}\b", template):
                raise InputError(f"{what} has {key!r}{did_you_mean(str(key), _KEYS)}; keys: {', '.join(_KEYS)}")
        if not isinstance(one.get("role"), str) or not one["role"]:
            raise InputError(f'{what} has no role: give it one, such as "user"')
        if not isinstance(one.get("content"), str):
            raise InputError(f"{what} must have content that is a text, got {one.get('content')!r:.80}")


def _drops(tokenizer: Any, messages: Sequence[Any], role: str, options: Mapping[str, Any]) -> bool:
    """Return whether the text of messages with a role is no part of the prompt: another text gives the same prompt."""
    if not any(one["role"] == role and one.get("content") for one in messages):
        return False
    marked = [{**one, "content": _MARK} if one["role"] == role else one for one in messages]
    try:
        found = [tokenizer.apply_chat_template(some, tokenize=False, **options) for some in (messages, marked)]
    except Exception:  # the template does not take this text
        return False
    return found[0] == found[1] and marked != messages
