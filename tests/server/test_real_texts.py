"""A language model behind the real server, over two stages, asked by OpenAI's client: texts are those of `LLM`, clients
that go away free their places, and texts survive the death of a rank."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from shardit import LLM, SamplingParams
from tests.support.real_server import RealServer, real_server
from tests.support.text_crowd import check_crowd, random_bodies, texts_of_one_rank

MODEL = "tiny/llama"
USER = [{"role": "user", "content": "Name three rivers."}]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("texts") / "data"
    with real_server("llama", folder, "--pipeline-parallel-size", "2", "--log-format", "json") as made:
        yield made
        assert made.stop() == 0


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL) as made:
        yield made


def metric(server: RealServer, name: str) -> float:
    """The value of a metric; NaN while the supervisor is too busy to tell its own."""
    lines = server.call("GET", "/metrics")[1].decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), math.nan)


def wait_idle(server: RealServer, timeout_s: float = 20.0) -> None:
    server.wait(
        lambda: metric(server, "shardit_in_flight_jobs") == metric(server, "shardit_queue_jobs") == 0,
        "nothing runs",
        timeout_s,
    )


def text_of(stream: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def test_texts_are_those_of_llm(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, **SAMPLED)
    (wanted,) = llm.chat(USER, params)
    answer = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=24, **SAMPLED)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == wanted.outputs[0].text
    assert answer.choices[0].finish_reason == wanted.outputs[0].finish_reason
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert answer.usage.completion_tokens == len(wanted.outputs[0].token_ids)
    stream = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=24, stream=True, **SAMPLED)  # type: ignore[call-overload]
    assert text_of(stream) == wanted.outputs[0].text
    (wanted,) = llm.generate("Once", SamplingParams(max_tokens=9, n=2, logprobs=2, stop="e", **SAMPLED))
    texts = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=9, n=2, logprobs=2, stop="e", temperature=0.9, seed=7
    )
    assert [one.text for one in texts.choices] == [one.text for one in wanted.outputs]
    assert [one.finish_reason for one in texts.choices] == [one.finish_reason for one in wanted.outputs]


def test_log_probabilities_of_a_prompt(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, n=2, logprobs=2, prompt_logprobs=2, **SAMPLED)
    made = client.completions.create(
        model=MODEL, prompt="Once é upon", echo=True, max_tokens=3, n=2, logprobs=2, temperature=0.9, seed=7
    )
    (wanted,) = llm.generate("Once é upon", params)
    assert wanted.prompt_logprobs is not None
    for choice, own in zip(made.choices, wanted.outputs, strict=True):
        assert choice.text == "Once é upon" + own.text
        found, count = choice.logprobs, len(wanted.prompt_token_ids)
        assert found is not None
        pairs = zip(wanted.prompt_token_ids, wanted.prompt_logprobs, strict=True)
        expected = [values and values[token] for token, values in pairs]
        expected += [values[token] for token, values in zip(own.token_ids, own.logprobs or (), strict=True)]
        assert found.token_logprobs == pytest.approx(expected)
        assert found.top_logprobs is not None
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        assert all(0 < len(values) <= 2 for values in found.top_logprobs[1:])
        assert found.text_offset is not None
        assert found.text_offset[count] == len("Once é upon")
        assert found.text_offset == sorted(found.text_offset)


def test_defaults_are_those_of_the_model(client: openai.OpenAI, llm: LLM) -> None:
    (wanted,) = llm.generate("Once")
    assert client.completions.create(model=MODEL, prompt="Once").choices[0].text == wanted.outputs[0].text


def test_a_bias_on_logits(client: openai.OpenAI) -> None:
    made = client.completions.create(model=MODEL, prompt="Once", max_tokens=5, temperature=0, logit_bias={"72": 100})
    assert made.choices[0].text == "g" * 5
    with pytest.raises(openai.BadRequestError, match="logit_bias must have tokens from 0 to"):
        client.completions.create(model=MODEL, prompt="Once", logit_bias={"999999": 1})


BAD_SCHEMAS: list[tuple[Any, str]] = [
    ({"properties": {"foo": "bar"}}, r"schema\.properties\.foo"),
    ({"type": "array", "items": {"not": {}}}, r"schema\.items.*not"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
]
GOOD_SCHEMAS: list[Any] = [
    {"type": "integer", "minimum": 0, "maximum": 20000000000},
    {"type": "array", "items": [{"type": "boolean"}, {"enum": [1, 2]}], "minItems": 2, "maxItems": 2},
    {
        "type": "object",
        "patternProperties": {"^a[bc]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
]


def test_a_schema_hurts_only_its_sender(server: RealServer, client: openai.OpenAI, llm: LLM) -> None:
    """Good and bad ones, beside a free text; ranks keep their process ids. Texts are those of `LLM`."""
    pytest.importorskip("llguidance")
    server.wait_ready()
    before = server.pids()
    body: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 60, **SAMPLED}
    (wanted,) = llm.generate("Once", SamplingParams(max_tokens=60, **SAMPLED))
    stream = client.completions.create(**body, stream=True)
    free = next(stream).choices[0].text
    for schema, words in BAD_SCHEMAS:
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match=words):
            client.completions.create(**body, extra_body={"response_format": form})
    for schema in GOOD_SCHEMAS:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        texts = client.completions.create(**body, n=2, extra_body={"response_format": form})
        for choice in texts.choices:
            assert choice.finish_reason == "stop"
            jsonschema.Draft7Validator(schema).validate(json.loads(choice.text))
        params = SamplingParams(max_tokens=60, n=2, structured_outputs={"json": schema}, **SAMPLED)
        assert [one.text for one in llm.generate("Once", params)[0].outputs] == [one.text for one in texts.choices]
    assert free + "".join(chunk.choices[0].text for chunk in stream) == wanted.outputs[0].text
    assert server.pids() == before


def test_metrics_of_caches(server: RealServer, client: openai.OpenAI) -> None:
    wait_idle(server)
    hits = metric(server, "shardit_prefix_hits_total")
    for _ in range(2):
        client.completions.create(model=MODEL, prompt="a long beginning that is the same in two prompts", max_tokens=3)
    server.wait(lambda: metric(server, "shardit_prefix_hits_total") >= hits + 1, "it is counted", 5.0)
    used, limit = (metric(server, f'shardit_cache_{name}{{replica="0"}}') for name in ("bytes", "limit_bytes"))
    assert 0 < used < limit
    assert metric(server, 'shardit_cache_share{replica="0"}') == pytest.approx(used / limit)
    assert metric(server, "shardit_prompt_tokens_total") > 90


def test_errors_are_those_of_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a" * 512)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    assert [one.id for one in client.models.list()] == [MODEL]


def test_many_clients_at_once(client: openai.OpenAI, llm: LLM) -> None:
    params = [SamplingParams(max_tokens=4 + 3 * n, temperature=0.8, seed=n) for n in range(10)]
    wanted = [one.outputs[0].text for one in llm.generate([f"prompt {n}" for n in range(10)], params)]
    found: dict[int, str] = {}

    def ask(n: int) -> None:
        body: dict[str, Any] = {"max_tokens": 4 + 3 * n, "temperature": 0.8, "seed": n}
        stream = client.completions.create(model=MODEL, prompt=f"prompt {n}", stream=True, **body)
        found[n] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[n] for n in range(10)] == wanted


# Clients that go away.


def long_body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Once", "max_tokens": 450, **more}


@contextlib.contextmanager
def connected(server: RealServer, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection on which a completion was requested; closed at the end."""
    data = json.dumps(body).encode()
    names = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    head = f"POST /v1/completions HTTP/1.1\r\n{names}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + data)
        yield connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(server: RealServer, stream: bool) -> None:
    wait_idle(server)
    with connected(server, long_body(stream=stream, ignore_eos=True)) as connection:
        if stream:
            while b"data:" not in connection.recv(4096):
                pass
        server.wait(lambda: metric(server, "shardit_in_flight_jobs") == 1, "it runs")
        left = time.monotonic()
    wait_idle(server, 1.5)  # the whole text would take several seconds
    assert time.monotonic() - left < 1.5
    assert server.events("job_ended")[-1]["state"] == "cancelled"


def test_a_client_that_leaves_the_queue(server: RealServer) -> None:
    wait_idle(server)
    slots = int(metric(server, "shardit_slots"))
    with contextlib.ExitStack() as stack:
        for _ in range(slots):
            stack.enter_context(connected(server, long_body(ignore_eos=True)))
        server.wait(lambda: metric(server, "shardit_in_flight_jobs") == slots, "all run")
        with connected(server, long_body(stream=True, ignore_eos=True)):
            server.wait(lambda: metric(server, "shardit_queue_jobs") == 1, "it waits")
        server.wait(lambda: metric(server, "shardit_queue_jobs") == 0, "it is gone", 1.5)
        assert metric(server, "shardit_in_flight_jobs") == slots
    wait_idle(server, 5.0)


# Deaths.


def test_texts_survive_the_death_of_a_rank(server: RealServer, client: openai.OpenAI) -> None:
    """Two streams, one of two texts, continue after the restart: no token is repeated or lost."""
    wait_idle(server)
    bodies: list[dict[str, Any]] = [
        {"max_tokens": 90, "temperature": 1.0, "seed": 1, "n": 2},
        {"max_tokens": 60, "temperature": 0.0, "frequency_penalty": 0.5},
    ]
    more = {"model": MODEL, "prompt": "Once", "extra_body": {"ignore_eos": True}}
    wanted = [client.completions.create(**more, **body) for body in bodies]
    streams = [
        client.completions.create(**more, **body, stream=True, stream_options={"include_usage": True})
        for body in bodies
    ]
    found = [[next(stream) for _ in range(10)] for stream in streams]
    assert not any(choice.finish_reason for chunks in found for chunk in chunks for choice in chunk.choices)
    restarts = len(server.events("ranks_down"))
    server.kill("rank 1")
    for chunks, stream in zip(found, streams, strict=True):
        chunks += stream
    assert len(server.events("ranks_down")) == restarts + 1
    for chunks, whole in zip(found, wanted, strict=True):
        for index, choice in enumerate(whole.choices):
            own = [one for chunk in chunks for one in chunk.choices if one.index == index]
            assert "".join(one.text for one in own) == choice.text
            assert own[-1].finish_reason == choice.finish_reason
        assert chunks[-1].usage == whole.usage
    assert all(server.begun(chunks[0].id.replace("cmpl-", "text_")) == 2 for chunks in found)


def test_a_text_that_has_ended_stays_as_it_is(server: RealServer, client: openai.OpenAI) -> None:
    """One of two texts has ended at a stop string when a rank dies; the other one goes on."""
    server.wait_ready()
    wait_idle(server)
    body: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 90, "temperature": 1.0, "seed": 1, "n": 2}
    body["extra_body"] = {"ignore_eos": True}
    first = client.completions.create(**body).choices[0].text
    body["stop"] = next(one for one in first[3:9] if one.isascii())
    wanted = client.completions.create(**body)
    lengths = [len(one.text) for one in wanted.choices]
    assert abs(lengths[0] - lengths[1]) > 4, wanted
    stream = client.completions.create(**body, stream=True, stream_options={"include_usage": True})
    chunks = [next(stream) for _ in range(2 * min(lengths) + 6)]
    server.kill("rank 1")
    chunks += stream
    for index, choice in enumerate(wanted.choices):
        own = [one for chunk in chunks for one in chunk.choices if one.index == index]
        assert "".join(one.text for one in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage == wanted.usage


def test_a_text_that_waits_survives_the_death_of_a_rank(server: RealServer, client: openai.OpenAI) -> None:
    server.wait_ready()
    wait_idle(server)
    body: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 80, "extra_body": {"ignore_eos": True}}
    wanted = client.completions.create(**body)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(client.completions.create(**body)))
    thread.start()
    server.wait(lambda: metric(server, "shardit_in_flight_jobs") == 1, "it runs")
    server.kill("rank 0")
    thread.join(60)
    assert found[0].choices == wanted.choices
    assert found[0].usage == wanted.usage


def test_texts_end_with_their_connections(server: RealServer, client: openai.OpenAI) -> None:
    """The API process dies: its texts are cancelled, and a new one takes requests."""
    wait_idle(server)
    stream = client.completions.create(**long_body(extra_body={"ignore_eos": True}, stream=True))
    next(stream)
    server.kill("api")
    with pytest.raises(openai.APIConnectionError):
        list(stream)
    server.wait_ready()
    wait_idle(server)
    assert server.events("job_ended")[-1]["state"] == "cancelled"
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=2).usage.completion_tokens == 2


def test_many_requests_with_cancels_and_a_death(server: RealServer, client: openai.OpenAI, llm: LLM) -> None:
    """Each ends once, and those that are not cancelled have the texts of one rank."""
    wait_idle(server)
    bodies = random_bodies(5, count=40, vocabulary=258)
    before = len(server.events("job_ended"))
    check_crowd(server, client, bodies, texts_of_one_rank(llm, bodies))
    wait_idle(server)
    ended = [line["request_id"] for line in server.events("job_ended")[before:]]
    assert len(set(ended)) == len(ended)


def test_the_store_keeps_no_texts(server: RealServer) -> None:
    wait_idle(server)
    jobs = server.folder / "jobs"
    server.wait(lambda: not list(jobs.iterdir()), "no job is left")
