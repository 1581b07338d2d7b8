"""Wrong requests for texts: each has one line that says what to change, and hurts nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardit.language.options import LanguageOptions
from shardit.server.http.texts.fields import check_fields, text_fields
from shardit.server.http.texts.forms import form_of
from tests.support.http_calls import error_of
from tests.support.http_fake import IMAGE, Served, serving
from tests.support.text_fake import INFO, LIMIT, ask, served_texts

USER = {"role": "user", "content": "hi"}


def chat_error(texts: Served, body: dict[str, Any], status: int = 400) -> Any:
    return error_of(texts, "/v1/chat/completions", {"messages": [USER], **body}, status)


def prompt_error(texts: Served, body: dict[str, Any], status: int = 400) -> Any:
    return error_of(texts, "/v1/completions", {"prompt": "hi", **body}, status)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "128"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "more than max_tokens=3"),
        ({"min_tokens": LIMIT}, "min_tokens", "more than max_tokens="),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", 1]}, "stop", "valid string"),
        ({"seed": -2}, "seed", "greater than or equal to -1"),
        ({"seed": 2**63}, "seed", "less than or equal to"),
        ({"stop_token_ids": [INFO.vocabulary]}, "stop_token_ids", f"from 0 to {INFO.vocabulary - 1}"),
        ({"logit_bias": {"258": 1}}, "logit_bias", f"from 0 to {INFO.vocabulary - 1}"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "match pattern"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "not permitted"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"max_token": 3}, "max_token", "did you mean 'max_tokens'"),
        ({"priority": 11}, "priority", "less than or equal to 10"),
    ],
)
def test_fields_of_both(texts: Served, body: dict[str, Any], param: str, words: str) -> None:
    for error in (chat_error(texts, body), prompt_error(texts, body)):
        assert error["param"] == param, error
        assert words in error["message"], error
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": ["hi"]}, "messages", "valid dictionary"),
        ({"messages": [{}]}, "messages", "has no role"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages", "has no role"),
        ({"messages": [{"role": "user"}]}, "messages", "must have content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "must have content"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages", "must have content"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages", "has 'colour'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text only"),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "messages", "tool_calls[0] must be"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "disagree (4 and 3)"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 3}, "logprobs", "valid boolean"),
    ],
)
def test_fields_of_chats(texts: Served, body: dict[str, Any], param: str, words: str) -> None:
    error = chat_error(texts, body)
    assert error["param"] == param, error
    assert words in error["message"], error


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [""]}, "prompt", "no tokens"),
        ({"prompt": [[]]}, "prompt", "got []"),
        ({"prompt": ["a", 1]}, "prompt", "got 1"),
        ({"prompt": [True]}, "prompt", "got True"),
        ({"prompt": [1.5]}, "prompt", "got 1.5"),
        ({"prompt": {"a": 1}}, "prompt", "valid string"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": [-1]}, "prompt", "from 0 to 257, got -1"),
        ({"prompt": [258]}, "prompt", "from 0 to 257, got 258 to 258"),
        ({"prompt": [[3], [258]]}, "prompt", "from 0 to 257"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128 prompts"),
        ({"prompt": ["a"] * 100, "n": 2}, "n", "are 200 texts"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo", "with logprobs does not go with stream"),
        ({"suffix": "x"}, "suffix", "must be empty"),
        ({"best_of": 2}, "best_of", "must be as n"),
        ({"messages": [USER]}, "messages", "no field"),
    ],
)
def test_fields_of_completions(texts: Served, body: dict[str, Any], param: str, words: str) -> None:
    error = prompt_error(texts, body)
    assert error["param"] == param, error
    assert words in error["message"], error


def schema(value: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": value, **more}}}


SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "response_format.type should be"),
        ({"response_format": {}}, "response_format", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format", f"{SCHEMA} is missing"),
        (schema(None), "response_format", "valid dictionary"),
        (schema({}, strictly=True), "response_format", "json_schema.strictly"),
        (schema({"properties": {"foo": "bar"}}), "response_format", f"{SCHEMA}.properties.foo cannot be used"),
        (schema({"not": {}}), "response_format", f'{SCHEMA} cannot be used: Unimplemented keys: ["not"]'),
        (schema({"$ref": "#"}), "response_format", "no text has this form"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "structured_outputs.regex cannot be used"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "must have one of"),
        ({"structured_outputs": {"jason": {}}}, "structured_outputs", "jason"),
        ({"structured_outputs": {"regex": "a"}, **schema({})}, "structured_outputs", "give one of them"),
        ({"min_tokens": 3, **schema({})}, "min_tokens", "does not go with structured_outputs"),
        ({"ignore_eos": True, **schema({})}, "ignore_eos", "does not go with structured_outputs"),
    ],
)
def test_forms(texts: Served, body: dict[str, Any], param: str, words: str) -> None:
    pytest.importorskip("llguidance")
    for error in (chat_error(texts, body), prompt_error(texts, body)):
        assert error["param"] == param, error
        assert words in error["message"], error


@pytest.mark.parametrize("value", [{"maximum": 20_000_000_000}, {"const": None}, {"type": ["null", "integer"]}])
def test_accepted_forms(texts: Served, value: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    for body in (schema(value, strict=True, description="x"), {"structured_outputs": {"json": value}}):
        for path in ("completions", "chat/completions"):
            assert ask(texts, path, prompt="hi", max_tokens=2, **body)[0] == 200
        form = form_of(check_fields(text_fields().chat, {"messages": [USER], **body}))
        assert form is not None
        assert form.given == {"json": value}


def test_a_prompt_that_is_too_long(texts: Served) -> None:
    error = prompt_error(texts, {"prompt": "a" * LIMIT})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert f"has {LIMIT} tokens" in error["message"]
    assert f"room for {LIMIT}" in error["message"]
    assert prompt_error(texts, {"prompt": ["a", "a" * 99]})["code"] == "context_length_exceeded"
    error = chat_error(texts, {"messages": [{"role": "user", "content": "a" * LIMIT}]})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert ask(texts, "completions", prompt="a" * (LIMIT - 1))[1]["usage"]["completion_tokens"] == 1


def test_a_limit_of_the_server(tmp_path: Path) -> None:
    with served_texts(tmp_path / "data", language=LanguageOptions(max_model_len=8)) as texts:
        assert "room for 8" in prompt_error(texts, {"prompt": "a" * 8})["message"]
        assert ask(texts, "completions", prompt="a" * 6)[1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0, "top_p": 1, "seed": 2**62, "frequency_penalty": -2, "stop": None, "user": "me"},
        {"n": 1.0, "max_tokens": 3.0, "logit_bias": {}, "stop": []},
        {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "logprobs": False},
        {"messages": [USER, USER]},
        {"messages": [{"role": "developer", "content": "x"}, USER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": None},
                USER,
            ]
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
            ]
        },
    ],
)
def test_accepted_chats(texts: Served, body: dict[str, Any]) -> None:
    status, answer = ask(texts, **{"messages": [USER], "max_tokens": 3, **body})
    assert status == 200, answer


def test_content_in_parts_is_one_text(texts: Served) -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    answers = [
        ask(texts, messages=[{"role": "user", "content": content}], max_tokens=20)[1] for content in (parts, "abcd")
    ]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_bodies(texts: Served) -> None:
    error = error_of(texts, "/v1/completions", b"{", 400, {"Content-Type": "application/json"})
    assert error["code"] == "invalid_json"
    assert error_of(texts, "/v1/completions", b"{}", 415, {"Content-Type": "text/plain"})["code"]
    assert prompt_error(texts, {"prompt": "a" * 17 * 1024**2}, 413)["code"] == "request_too_large"
    assert prompt_error(texts, {"prompt": "\ud800"})["code"] == "invalid_json"
    assert prompt_error(texts, {"model": "other"}, 404)["code"] == "model_not_found"
    assert error_of(texts, "/v1/completions", {"prompt": "a"}, 400, {"Idempotency-Key": "k"})["param"]
    assert len(texts.call("POST", "/v1/completions", {"prompt": [5] * 20_000})[1]["error"]["message"]) < 200


def test_a_server_makes_one_kind(texts: Served, tmp_path: Path) -> None:
    error = error_of(texts, "/v1/images/generations", {"prompt": "a cat"}, 400)
    assert error["code"] == "wrong_kind"
    assert "/v1/chat/completions" in error["message"]
    with serving(tmp_path / "data", IMAGE) as pictures:
        assert chat_error(pictures, {})["code"] == "wrong_kind"


def test_a_job_that_fails(texts: Served) -> None:
    error = prompt_error(texts, {"prompt": "fail"}, 500)
    assert error["code"] == "ranks_died"
    status, stream = ask(texts, "completions", prompt="fail", stream=True)
    assert status == 200
    *_, last, end = stream.decode().strip().split("\n\n")
    assert '"code": "ranks_died"' in last
    assert end == "data: [DONE]"


def test_a_template_that_refuses(tmp_path: Path) -> None:
    """In the words of the template; without one, with what to do instead."""
    import shutil

    from shardit.models.tiny.language import language_folder

    folder = tmp_path / "model"
    found = language_folder("tiny/llama")
    assert found is not None
    shutil.copytree(found, folder)
    template = "{% if messages[0].role == messages[1].role %}{{ raise_exception('Roles must alternate!') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    with served_texts(tmp_path / "data", model=str(folder)) as texts:
        error = chat_error(texts, {"messages": [USER, USER]})
        assert "Roles must alternate!" in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
    (folder / "chat_template.jinja").unlink()
    with served_texts(tmp_path / "other", model=str(folder)) as texts:
        assert "send a prompt to /v1/completions" in chat_error(texts, {})["message"]
