"""Texts over HTTP with a model that repeats its prompt: formats of answers and streams, stop strings, usage."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.http_fake import Served
from tests.support.text_fake import END, LIMIT, ask, chunks, ids, joined


def both(texts: Served, path: str = "completions", **body: Any) -> tuple[str, str | None]:
    """The text and the finish reason of a request, which are the same in a stream."""
    status, answer = ask(texts, path, **body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    text = choice["message"]["content"] if path.startswith("chat") else choice["text"]
    status, stream = ask(texts, path, **body, stream=True)
    assert status == 200, stream
    assert joined(chunks(stream)) == (text, choice["finish_reason"])
    return text, choice["finish_reason"]


def test_a_completion_has_openais_format(texts: Served) -> None:
    status, answer = ask(texts, "completions", prompt="abc", max_tokens=5)
    assert status == 200
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1e9
    assert answer == {
        "object": "text_completion",
        "model": "tiny/llama",
        "choices": [{"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }


def test_an_answer_has_openais_format(texts: Served) -> None:
    status, answer = ask(texts, prompt="hi", max_tokens=4)
    assert status == 200
    assert answer.pop("id").startswith("chatcmpl-")
    message = {"role": "assistant", "content": "<use", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len("<user>hi<assistant>")


def test_a_stream_of_an_answer(texts: Served) -> None:
    found = chunks(ask(texts, prompt="hi", max_tokens=3, stream=True)[1])
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in found}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "<"}, {"content": "u"}, {"content": "s"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [None] * 4 + ["length"]
    assert not any("usage" in chunk for chunk in found)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_usage_comes_last_in_a_stream(texts: Served, path: str) -> None:
    body = {"prompt": "hello", "max_tokens": 4, "n": 2}
    _, whole = ask(texts, path, **body)
    found = chunks(ask(texts, path, **body, stream=True, stream_options={"include_usage": True})[1])
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == whole["usage"]
    assert [chunk["usage"] for chunk in found[:-1]] == [None] * (len(found) - 1)
    assert whole["usage"]["completion_tokens"] == 8
    assert joined(found, 0) == joined(found, 1)


@pytest.mark.parametrize(
    ("prompt", "stop", "text"),
    [
        ("xDEFGHIJy", "DEFGHIJ", "x"),
        ("pleassistant", "assistant", "ple"),
        ("a stop!", ["stop"], "a "),
        ("one two", ["two", "ne"], "o"),
        ("aab", "aab", ""),
        ("xaaab", ["aab"], "xa"),
    ],
)
def test_stop_strings(texts: Served, prompt: str, stop: Any, text: str) -> None:
    assert both(texts, prompt=prompt, max_tokens=30, stop=stop) == (text, "stop")


def test_what_may_become_a_stop_string_is_released(texts: Served) -> None:
    assert both(texts, prompt="pleas", max_tokens=5, stop="assistant") == ("pleas", "length")


def test_an_end_token_is_no_part_of_the_text(texts: Served) -> None:
    assert both(texts, prompt=[*ids("ab"), END], max_tokens=9) == ("ab", "stop")
    assert ask(texts, "completions", prompt=[*ids("ab"), END])[1]["usage"]["completion_tokens"] == 3


def test_no_piece_ends_within_a_character(texts: Served) -> None:
    text = "a🙂é你\n"
    assert both(texts, prompt=text, max_tokens=len(ids(text))) == (text, "length")
    found = chunks(ask(texts, "completions", prompt=text, max_tokens=len(ids(text)), stream=True)[1])
    assert [chunk["choices"][0]["text"] for chunk in found] == [*text, ""]


def test_several_prompts_and_several_texts(texts: Served) -> None:
    body = {"prompt": ["ab", "xyz"], "n": 2, "max_tokens": 3}
    _, answer = ask(texts, "completions", **body)
    assert [choice["text"] for choice in answer["choices"]] == ["aba", "aba", "xyz", "xyz"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    found = chunks(ask(texts, "completions", **body, stream=True)[1])
    assert [joined(found, index)[0] for index in range(4)] == ["aba", "aba", "xyz", "xyz"]


def test_prompts_of_tokens(texts: Served) -> None:
    for prompt in (ids("abc"), [ids("abc")]):
        assert ask(texts, "completions", prompt=prompt, max_tokens=3)[1]["choices"][0]["text"] == "abc"


def test_a_text_after_its_prompt(texts: Served) -> None:
    assert both(texts, prompt="abc", max_tokens=2, echo=True) == ("abcab", "length")
    assert both(texts, prompt=[*ids("ab"), END], max_tokens=9, echo=True) == ("ab<end>ab", "stop")
    _, answer = ask(texts, "completions", prompt=["ab", "xy"], n=2, max_tokens=1, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["aba", "aba", "xyx", "xyx"]


def test_log_probabilities_of_an_answer(texts: Served) -> None:
    body = {"prompt": "é", "max_tokens": 8, "logprobs": True, "top_logprobs": 1}
    (choice,) = ask(texts, **body)[1]["choices"]
    whole = choice["logprobs"]["content"]
    first = {"token": "<", "logprob": -0.5, "bytes": [60]}
    assert whole[0] == {**first, "top_logprobs": [first]}
    assert [one["bytes"] for one in whole[6:8]] == [[0xC3], [0xA9]]  # halves of a character
    found = chunks(ask(texts, **body, stream=True)[1])
    streamed = [chunk["choices"][0]["logprobs"] for chunk in found]
    assert [one for part in streamed if part for one in part["content"]] == whole


def test_log_probabilities_of_a_completion(texts: Served) -> None:
    (choice,) = ask(texts, "completions", prompt=[*ids("ab"), END], logprobs=2)[1]["choices"]
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [{"a": -0.5, "<end>": -2.0}, {"b": -0.5, "<end>": -2.0}]
    assert choice["logprobs"]["text_offset"] == [0, 1]


@pytest.mark.parametrize(("asked", "tokens"), [(None, LIMIT - 60), (100, LIMIT - 60), (3, 3)])
def test_tokens_end_with_the_room_of_the_model(texts: Served, asked: int | None, tokens: int) -> None:
    content = "a" * (60 - len("<user><assistant>"))
    for name in ("max_tokens", "max_completion_tokens"):
        _, answer = ask(texts, prompt=content, **({} if asked is None else {name: asked}))
        assert answer["usage"]["completion_tokens"] == tokens
        assert answer["choices"][0]["finish_reason"] == "length"


def test_nothing_is_kept(texts: Served) -> None:
    assert ask(texts, prompt="hi")[0] == 200
    texts.until_empty()


def test_tools_that_a_template_does_not_show(texts: Served) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": stream, "tools": tools}
        status, _, headers = texts.call("POST", "/v1/chat/completions", body)
        assert status == 200
        assert "shows no tools" in headers["x-shardit-notes"]
        _, _, headers = texts.call("POST", "/v1/chat/completions", {**body, "tool_choice": "none"})
        assert "x-shardit-notes" not in headers
