"""Texts with grammars beside free ones: over stages and tensor ranks, pushed out, continued, and failing alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("llguidance")

from shardit import DiffusionParallelConfig, SamplingParams
from shardit.core.comm.mesh import init_mesh
from shardit.core.stages.runtime import Runtime
from shardit.language.batching.batcher import Batcher
from shardit.language.batching.scheduler import BatchLimits
from shardit.language.grammar.token_masks import TokenMask, TokenMasks
from shardit.language.request.rows import PromptRow
from shardit.language.sharding import lay_out_decoder, shard_decoder
from tests.language import families, folders
from tests.language.batched import outputs
from tests.support.ranks import run_ranks

TOKENIZER = folders.tokenizer()
END = 1
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "names": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    },
    "required": ["colour", "count", "names"],
    "additionalProperties": False,
}


def model_of(name: str) -> Any:
    config = families.config_of(name)
    config.vocab_size = len(TOKENIZER)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    families.randomize(model)
    return model


def batcher_of(model: Any, runtime: Runtime | None = None, **limits: Any) -> Batcher:
    wanted = BatchLimits(**{"rows": 32, "tokens": 512, **limits})
    ends = frozenset([END])
    masks = TokenMasks(TOKENIZER, ends)
    return Batcher(model, runtime, wanted, lambda columns: columns, ends, 0, lambda *_: "", masks)


def rows(**changes: Any) -> list[PromptRow]:
    """Two texts by a schema, one choice and one free text, each with its own seed."""
    forms: list[Any] = [{"json": SCHEMA}, None, {"choice": ["yes", "no"]}, {"json": SCHEMA}]
    return [
        PromptRow(
            tuple(range(20 + number, 26 + 2 * number)),
            SamplingParams(temperature=1.0, max_tokens=150 if form else 20, structured_outputs=form, **changes),
            seed=number,
        )
        for number, form in enumerate(forms)
    ]


def check(tokens: list[tuple[int, ...]]) -> None:
    for number in (0, 3):
        made = json.loads(TOKENIZER.decode(tokens[number], skip_special_tokens=True))
        assert made["colour"] in ("red", "green")
        assert 0 <= made["count"] <= 99
        assert 2 <= len(made["names"]) <= 4
        assert tokens[number][-1] == END
    assert TOKENIZER.decode(tokens[2], skip_special_tokens=True) in ("yes", "no")


def made(batcher: Batcher, given: list[PromptRow], runtime: Runtime | None = None) -> list[tuple[int, ...]]:
    return [output.rows[0][0] for output in outputs(batcher, given, runtime)]


@pytest.mark.parametrize("name", ["llama", "rwkv"])
def test_beside_free_texts(name: str) -> None:
    """Also in a family whose rows cannot leave a batch alone."""
    model = model_of(name)
    together = made(batcher_of(model, rows=4), rows())
    check(together)
    assert together == [made(batcher_of(model), [row])[0] for row in rows()]
    free = [PromptRow(row.prompt, SamplingParams(temperature=1.0, max_tokens=20), row.seed) for row in rows()]
    assert made(batcher_of(model), free)[1] == together[1]
    assert made(batcher_of(model), free)[0] != together[0][:20]  # control


def test_pushed_out_and_continued() -> None:
    model = model_of("llama")
    expected = made(batcher_of(model), rows())
    found = outputs(batcher_of(model, memory=90), rows())
    assert sum(output.preemptions for output in found) > 0
    assert [output.rows[0][0] for output in found] == expected
    half = [
        PromptRow(row.prompt, row.params, row.seed, tokens[: len(tokens) // 2])
        for row, tokens in zip(rows(), expected, strict=True)
    ]
    assert made(batcher_of(model), half) == expected


def test_log_probabilities_and_penalties() -> None:
    model = model_of("llama")
    found = outputs(batcher_of(model), rows(logprobs=2, presence_penalty=1.0, top_k=5))
    check([output.rows[0][0] for output in found])
    for output in found:
        assert len(output.rows[0][3] or ()) == len(output.rows[0][0])


@pytest.mark.parametrize("number", [0, 1])
def test_a_grammar_that_fails_ends_its_request_alone(number: int) -> None:
    """Its first token, or a later one, is refused; the request has an error, the others their texts."""
    model = model_of("llama")
    expected = made(batcher_of(model), rows())
    batcher = batcher_of(model)
    row = rows()[0]
    wrong = PromptRow(row.prompt, row.params, row.seed, tuple(TOKENIZER("xx")["input_ids"][:number]))
    broken = SamplingParams(max_tokens=9, structured_outputs={"json": {"$ref": "#"}})  # type: ignore[arg-type]
    found = outputs(batcher, [wrong if number else PromptRow(row.prompt, broken, 0), *rows()])
    assert found[0].error is not None
    assert "no token of the model fits it" in found[0].error
    assert [output.rows[0][0] for output in found[1:]] == expected
    assert not batcher.is_open
    assert batcher.scheduler.used == 0


class Panicking:
    """A matcher that ends as llguidance does in a panic."""

    def consume_tokens(self, tokens: list[int]) -> None:
        raise type("PanicException", (BaseException,), {})("index out of range")


def test_a_panic_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, begin = model_of("llama"), TokenMasks.begin
    expected, form = made(batcher_of(model), rows()), {"regex": "[ab]+"}

    def broken(self: TokenMasks, given: Any, width: int) -> TokenMask:
        return TokenMask(Panicking(), width) if given.given == form else begin(self, given, width)

    monkeypatch.setattr(TokenMasks, "begin", broken)
    wrong = PromptRow((5, 6), SamplingParams(max_tokens=9, structured_outputs=form), 0)  # type: ignore[arg-type]
    found = outputs(batcher_of(model), [wrong, *rows()])
    assert "no token of the model fits it" in str(found[0].error)
    assert [output.rows[0][0] for output in found[1:]] == expected


def over_ranks(rank: int, count: int, method: str, config: DiffusionParallelConfig) -> Any:
    mesh = init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method)
    plain, model = model_of("llama"), model_of("llama")
    runtime = Runtime.of(mesh, split_batch=False)
    shard_decoder(model, runtime, lay_out_decoder(model, config), config)
    batcher = batcher_of(model, runtime, rows=2, groups=2)
    broken = PromptRow((5, 6), SamplingParams(structured_outputs={"json": {"$ref": "#"}}), 0)  # type: ignore[arg-type]
    found = outputs(batcher, [*rows(), broken], runtime)
    return [output.rows[0][0] for output in found[:-1]], found[-1].error, made(batcher_of(plain), rows())


@pytest.mark.parametrize("axis", ["pipeline_parallel_size", "tensor_parallel_size"])
def test_over_ranks(axis: str) -> None:
    for tokens, error, expected in run_ranks(2, over_ranks, DiffusionParallelConfig(**{axis: 2}), timeout=120):
        check(tokens)
        assert tokens == expected
        assert "no token of the model fits it" in error


def test_after_a_prompt_that_is_known() -> None:
    """The state of a grammar begins behind the prompt, whether its keys are computed or kept."""
    batcher = batcher_of(model_of("llama"))
    params = SamplingParams(temperature=1.0, max_tokens=150, structured_outputs={"json": SCHEMA})  # type: ignore[arg-type]
    row = PromptRow(tuple(range(20, 70)), params, seed=3)
    first, second = made(batcher, [row]), made(batcher, [row])
    assert first == second
    assert batcher.prefixes.hits == 1
    assert json.loads(TOKENIZER.decode(first[0], skip_special_tokens=True))["colour"] in ("red", "green")
