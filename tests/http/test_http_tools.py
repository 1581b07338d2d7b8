"""Calls of tools over HTTP with a model that repeats its prompt: in answers and streams, enforced ones, mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from shardit.models.tiny.language import language_folder
from shardit.server.http.texts.forms import form_of
from shardit.server.http.texts.tool_calls import ToolCalls
from shardit.server.options import LANGUAGE
from tests.support.http_calls import error_of
from tests.support.http_fake import Served, serving
from tests.support.text_fake import INFO, ask, chunks, served_texts

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris é"}}\n</tool_call>'
NOW = '<tool_call>{"name": "clock"}</tool_call>'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its template shows the content alone, so a text is what the user wrote."""
    folder = tmp_path_factory.mktemp("model") / "model"
    found = language_folder("tiny/llama")
    assert found is not None
    shutil.copytree(found, folder)
    (folder / "chat_template.jinja").write_text(
        "{# tools: <tool_call> #}{% for one in messages %}{{ one.content }}{% endfor %}"
    )
    info = dataclasses.replace(INFO, max_model_len=1000)
    with serving(folder.parent / "data", info, model=str(folder), task=LANGUAGE) as made:  # type: ignore[arg-type]
        yield made


def said(served: Served, text: str, **body: Any) -> tuple[str | None, list[tuple[str, str]], str]:
    """Content, calls and finish reason of an answer that is `text`; they are the same in a stream."""
    body = {"prompt": f"{text}#", "stop": "#", "max_tokens": 400, "tools": TOOLS, **body}
    status, answer = ask(served, **body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    pairs = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    streamed, content, reason = [], "", None
    for chunk in chunks(ask(served, **body, stream=True)[1]):
        (one,) = chunk["choices"]
        content += one["delta"].get("content", "")
        reason = one["finish_reason"]
        streamed += one["delta"].get("tool_calls", [])
    assert [call["index"] for call in streamed] == list(range(len(calls)))
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in streamed] == pairs
    assert (content or None, reason) == (message["content"] or None, choice["finish_reason"])
    return message["content"], pairs, choice["finish_reason"]


def test_calls_in_answers(served: Served) -> None:
    paris, now = ("weather", '{"city": "Paris é"}'), ("clock", "{}")
    assert said(served, PARIS) == (None, [paris], "tool_calls")
    assert said(served, f"I look.\n\n{PARIS}\n{NOW}\n") == ("I look.", [paris, now], "tool_calls")
    assert said(served, f"{NOW} and then") == ("and then", [now], "tool_calls")
    assert said(served, PARIS.removesuffix("</tool_call>")) == (None, [paris], "tool_calls")


@pytest.mark.parametrize(
    "text",
    [
        "no call <tool_cal",
        "a <tool_call>{}</tool_call> b",
        "a \n<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "wea',
        "</tool_call> x ",
    ],
)
def test_what_is_no_call_stays_text(served: Served, text: str) -> None:
    assert said(served, text) == (text, [], "stop")


def test_a_text_that_is_cut_short(served: Served) -> None:
    content, calls, reason = said(served, f"{NOW} {PARIS}", max_tokens=len(NOW) + 20)
    assert (calls, reason) == ([("clock", "{}")], "length")
    assert content is not None
    assert content.startswith("<tool_call>")


def test_calls_are_text_without_tools(served: Served) -> None:
    for body in ({"tools": None}, {"tool_choice": "none"}):
        assert said(served, NOW, **body) == (NOW, [], "stop")


def test_a_template_without_calls(tmp_path: Any) -> None:
    """Of a call in a form that is not known, all is text."""
    with served_texts(tmp_path / "data") as served:
        _, answer = ask(served, prompt=NOW[:20], max_tokens=30, tools=[CLOCK])
        assert "tool_calls" not in answer["choices"][0]["message"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_of_any_size(size: int) -> None:
    text = f"a  b\n{PARIS}\n\n{NOW} c <tool_call>x</tool_call> <tool"
    parser, content, calls = ToolCalls(), "", []
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    for number, piece in enumerate(pieces):
        found = parser.add(piece, is_last=number == len(pieces) - 1)
        content += found.text
        calls += [one["function"]["name"] for one in found.calls]
    assert content == "a  bc <tool_call>x</tool_call> <tool"
    assert calls == ["weather", "clock"]


def validates(body: dict[str, Any], text: str) -> bool:
    """Whether a text has the form that a request enforces."""
    from llguidance import LLMatcher, LLTokenizer

    form = form_of({"tools": TOOLS, **body})
    assert form is not None
    assert form.grammar is not None
    matcher = LLMatcher(LLTokenizer("byte"), form.grammar, log_level=0)
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


def test_enforced_calls() -> None:
    pytest.importorskip("llguidance")
    now = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    required: dict[str, Any] = {"tool_choice": "required"}
    assert validates(required, PARIS)
    assert validates(required, f"{now}\n{PARIS}")
    assert not validates({**required, "parallel_tool_calls": False}, f"{now}\n{PARIS}")
    assert not validates(required, PARIS.replace("city", "town"))
    assert not validates(required, f"Well, {PARIS}")
    named = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    assert validates(named, PARIS)
    assert not validates(named, now)
    assert ToolCalls().add(now, is_last=True).calls[0]["function"] == {"name": "clock", "arguments": "{}"}


def test_an_enforced_call_is_taken_apart(tmp_path: Any) -> None:
    """Also if the template of the model shows no tools."""
    pytest.importorskip("llguidance")
    info = dataclasses.replace(INFO, max_model_len=400)
    with serving(tmp_path / "data", info, model="tiny/llama", task=LANGUAGE) as served:  # type: ignore[arg-type]
        body = {"prompt": f"{NOW}#", "stop": "#", "max_tokens": 99, "tools": TOOLS, "tool_choice": "required"}
        status, answer = ask(served, **body)
        assert status == 200, answer
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "clock"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{}]}, "tools", "tools[0] must be"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "tools[0] must be"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "tools[1] must be"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]},
            "tools",
            "must be a JSON schema",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "'none', 'auto' or 'required'"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "tools has: weather, clock",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": name, "parameters": {"description": "x" * 60_000}}}
                    for name in "ab"
                ],
                "tool_choice": "required",
            },
            "tools",
            "tools has 120",
        ),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            "tool_choice and response_format both",
        ),
        (
            {
                "tools": [CLOCK, {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
            "tools[1].function.parameters cannot be used: Unimplemented",
        ),
    ],
)
def test_mistakes(served: Served, body: dict[str, Any], param: str, words: str) -> None:
    if words.endswith(("Unimplemented", "120")):
        pytest.importorskip("llguidance")
    error = error_of(served, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **body}, 400)
    assert error["param"] == param, error
    assert words in error["message"], error


def test_calls_go_back_to_the_model(served: Served) -> None:
    """What a client got is sent again, with the answer of the tool."""
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": json.dumps({})}}
    messages = [
        {"role": "user", "content": "when?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    status, answer = ask(served, messages=messages, tools=TOOLS, max_tokens=3)
    assert status == 200, answer
