"""Many clients of a language model at once: some leave in the middle of a text, and a rank is killed meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import openai

from shardit import LLM, SamplingParams
from tests.support.real_server import RealServer

CLIENTS = 8

Texts = list[tuple[str, str]]
"""The texts of a request with their finish reasons."""


def random_bodies(seed: int, count: int, vocabulary: int, longest: int = 49) -> list[dict[str, Any]]:
    """Requests of random lengths (texts of at most `longest` tokens), seeds, stops and penalties."""
    draw = random.Random(seed)
    return [
        {
            "prompt": [draw.randrange(2, vocabulary) for _ in range(draw.randrange(1, 40))],
            "max_tokens": draw.randrange(1, longest + 1),
            "temperature": draw.choice([0.0, 0.7, 1.3]),
            "seed": number,
            "n": draw.choice([1, 1, 2, 3]),
            "stop": draw.choice([None, ["e"], ["th", "1"]]),
            "frequency_penalty": draw.choice([0.0, 0.5]),
        }
        for number in range(count)
    ]


def texts_of_one_rank(llm: LLM, bodies: Sequence[dict[str, Any]]) -> list[Texts]:
    """What one rank makes of the same requests."""
    params = [SamplingParams(**{name: body[name] for name in body if name != "prompt"}) for body in bodies]
    found = llm.generate([body["prompt"] for body in bodies], params)
    return [[(one.text, one.finish_reason) for one in output.outputs] for output in found]


def _leaves(number: int) -> bool:
    return number % 3 == 1


def _asked(client: openai.OpenAI, model: str, number: int, body: dict[str, Any]) -> Texts | None:
    """The texts of a request; one of three is not streamed, and one of three is left after its first piece."""
    if number % 3 == 0:
        answer = client.completions.create(model=model, **body)
        return [(one.text, one.finish_reason) for one in answer.choices]
    stream = client.completions.create(model=model, stream=True, **body)
    if _leaves(number):
        next(stream)
        stream.close()
        return None
    parts = [["", ""] for _ in range(body["n"])]
    for chunk in stream:
        for one in chunk.choices:
            parts[one.index][0] += one.text
            parts[one.index][1] = one.finish_reason or ""
    return [(text, reason) for text, reason in parts]


def check_crowd(
    server: RealServer, client: openai.OpenAI, bodies: Sequence[dict[str, Any]], wanted: Sequence[Texts]
) -> None:
    """Send the requests by `CLIENTS` clients, with a death of a rank in the middle; compare the texts."""
    found: dict[int, Texts | None] = {}
    errors: list[BaseException] = []
    todo = iter(range(len(bodies)))

    def work() -> None:
        try:
            for number in todo:
                if number == len(bodies) // 2:
                    server.kill("rank 1")
                found[number] = _asked(client, server.model, number, bodies[number])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not errors
    assert sorted(found) == list(range(len(bodies)))
    for number, texts in found.items():
        assert texts == (None if _leaves(number) else wanted[number]), bodies[number]
