"""Options of `generate` over stages and tensor ranks: assisted decoding, outputs of layers, caches, failing code."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from shardit import DiffusionParallelConfig, RankError
from shardit.core.comm.mesh import init_mesh
from shardit.core.stages.runtime import Runtime
from shardit.language.sharding import lay_out_decoder, shard_decoder
from tests.language import families
from tests.language.cases import alike, errors_of
from tests.language.test_stages import Broken
from tests.support.ranks import run_ranks

STAGES, TENSOR = "pipeline_parallel_size", "tensor_parallel_size"
CLOSE = {STAGES: 0.0, TENSOR: 1e-4}
"""Maximum relative distance of logits and attention weights; tokens are equal."""


def call(model: Any, rows: int = 1, **options: Any) -> Any:
    ids = torch.randint(3, families.VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    outputs = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **outputs, **options)


class Heads:
    """Makes models of a family, with attention that returns its weights, plain or over the ranks."""

    def __init__(self, axis: str, rank: int, method: str):
        axes: dict[str, Any] = {axis: 2}
        self.config = DiffusionParallelConfig(**axes)
        mesh = init_mesh(self.config, device="cpu", timeout_s=30, rank=rank, init_method=method)
        self.runtime = Runtime.of(mesh, split_batch=False)

    def plain(self, name: str, seed: int = 0) -> Any:
        model = families.make(name, seed=seed)
        model.set_attn_implementation("eager")
        return model

    def sharded(self, name: str, seed: int = 0) -> Any:
        model = self.plain(name, seed)
        shard_decoder(model, self.runtime, lay_out_decoder(model, self.config), self.config)
        return model


def same(expected: Any, got: Any, close: float) -> bool:
    """Compare results of `generate`: tokens, logits, scores, attention weights, hidden states."""

    def parts(out: Any) -> Any:
        parts = [getattr(out, name, None) for name in ("logits", "scores", "attentions", "hidden_states")]
        return tree_map_only(torch.Tensor, lambda part: part.nan_to_num(neginf=-50.0), parts)

    return torch.equal(expected.sequences, got.sequences) and alike(parts(expected), parts(got), close)


def use_assistants(rank: int, count: int, method: str, axis: str) -> dict[str, bool]:
    heads, close = Heads(axis, rank, method), CLOSE[axis]
    plain, model = heads.plain("llama"), heads.sharded("llama")
    found: dict[str, bool] = {}

    def check(name: str, mine: Callable[[], dict[str, Any]], other: Callable[[], dict[str, Any]] | None = None) -> None:
        expected = call(plain, **(other or mine)())
        found[name] = same(expected, call(model, **mine()), close)

    def draft(seed: int, **options: Any) -> dict[str, Any]:
        return {"assistant_model": heads.plain("llama", seed), **options}

    check("assistant that is always right", lambda: draft(0))
    check("assistant that is often wrong", lambda: draft(5))
    check("sampled", lambda: draft(5, do_sample=True, top_k=20))
    check("assistants that differ", lambda: draft(5 + rank, do_sample=True), lambda: draft(5, do_sample=True))
    shared = heads.sharded("llama", 5)
    check("assistant over the ranks", lambda: {"assistant_model": shared}, lambda: draft(5))
    lookup: dict[str, Any] = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 20}
    check("lookup", lambda: {**lookup, "output_hidden_states": True})
    check("sampled lookup", lambda: {**lookup, "do_sample": True, "top_k": 4})
    check("early exit", lambda: {"assistant_early_exit": 2})
    wrong = call(heads.plain("llama", 1), **draft(5))
    found["control"] = not same(wrong, call(model, **draft(5)), close)
    return found


@pytest.mark.parametrize("axis", [STAGES, TENSOR])
def test_assisted_decoding(axis: str) -> None:
    for found in run_ranks(2, use_assistants, axis):
        assert len(found) == 9
        assert all(found.values()), found


def use_outputs(rank: int, count: int, method: str, axis: str) -> dict[str, Any]:
    heads, close, found = Heads(axis, rank, method), CLOSE[axis], dict[str, Any]()
    for name in ("llama", "gpt2", "mixtral", "gemma3_text") if axis == STAGES else ("llama", "gemma3_text"):
        plain, model = heads.plain(name), heads.sharded(name)
        for options in ({"use_cache": True}, {"num_beams": 2}):
            expected, got = (call(one, 2, output_attentions=True, **options) for one in (plain, model))
            assert len(expected.attentions[1]) == 4
            found[f"{name} {options}"] = same(expected, got, close)
        call(model, 2)  # without outputs, after calls with them
        if name == "mixtral":
            ids = torch.arange(10, 18).reshape(2, 4)
            with torch.no_grad():
                expected, got = (one(ids, output_router_logits=True) for one in (plain, model))
            found["routers"] = alike(expected.router_logits, got.router_logits) and bool(
                expected.aux_loss == got.aux_loss
            )
    return found


@pytest.mark.parametrize("axis", [STAGES, TENSOR])
def test_outputs_of_layers(axis: str) -> None:
    for found in run_ranks(2, use_outputs, axis):
        assert len(found) == (9 if axis == STAGES else 4)
        assert all(found.values()), found


class Failing(LogitsProcessor):
    """Fails on one rank before it reads values, which the other reads."""

    def __init__(self, here: bool, length: int = 11):
        self.here, self.length = here, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.here and input_ids.shape[1] >= self.length:
            raise KeyError("failing")
        return scores.masked_fill(scores == scores.max(), 0) if float(scores.max()) > -1e9 else scores


class Noisy(LogitsProcessor):
    """Adds other numbers on each rank, also in place."""

    def __init__(self, rank: int):
        self.generator = torch.Generator().manual_seed(rank)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.add_(3 * torch.randn(scores.shape, generator=self.generator))


class Full(BaseStreamer):
    """Fails at its third call."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 3:
            raise BrokenPipeError("full")

    def end(self) -> None:
        pass


def use_failing_code(rank: int, count: int, method: str, axis: str) -> dict[str, Any]:
    heads, found = Heads(axis, rank, method), dict[str, Any]()
    plain, model = heads.plain("llama"), heads.sharded("llama")
    calls = {
        "processor 0": {"logits_processor": LogitsProcessorList([Failing(rank == 0)])},
        "processor 1": {"logits_processor": LogitsProcessorList([Failing(rank == 1)])},
        "prefix": {"prefix_allowed_tokens_fn": lambda batch, ids: 1 // (1 - rank) and [3, 4, 5]},
        "criterion": {"stopping_criteria": StoppingCriteriaList([Broken(rank == 1)]), "prompt_lookup_num_tokens": 3},
        "streamer": {"streamer": Full()},
        "processor of an assistant": {
            "logits_processor": LogitsProcessorList([Failing(rank == 1, length=9)]),
            "assistant_model": heads.plain("llama", 5),
        },
    }
    began = time.monotonic()
    for name, options in calls.items():
        with pytest.raises((KeyError, ZeroDivisionError, BrokenPipeError, RankError)) as failure:
            call(model, **options)
        found[name] = str(failure.value) if isinstance(failure.value, RankError) else "its own"
    found["seconds"] = time.monotonic() - began
    expected = call(plain, 2, logits_processor=LogitsProcessorList([Noisy(count - 1 if axis == STAGES else 0)]))
    noisy = call(model, 2, logits_processor=LogitsProcessorList([Noisy(rank)]))
    found["noisy"] = torch.equal(expected.sequences, noisy.sequences)
    found["right after errors"] = same(call(plain), call(model), CLOSE[axis])
    return found


@pytest.mark.parametrize("axis", [STAGES, TENSOR])
def test_code_that_fails_on_one_rank_fails_on_all(axis: str) -> None:
    first, second = run_ranks(2, use_failing_code, axis)
    texts = {
        "processor 0": (1, "rank 0 failed: a logits processor failed: KeyError: 'failing'"),
        "processor 1": (0, "rank 1 failed: a logits processor failed: KeyError: 'failing'"),
        "prefix": (
            0,
            "rank 1 failed: a logits processor failed: ZeroDivisionError: integer division or modulo by zero",
        ),
        "criterion": (0, "rank 1 failed: a stopping criterion failed: KeyError: 'broken'"),
        "streamer": (1, "rank 0 failed: a streamer failed: BrokenPipeError: full"),
        "processor of an assistant": (0, "rank 1 failed: the assistant failed: KeyError: 'failing'"),
    }
    for name, (other, text) in texts.items():
        assert (first, second)[other][name] == text
        assert (first, second)[1 - other][name] == "its own"
    for found in (first, second):
        assert found["noisy"]
        assert found["right after errors"]
        assert found["seconds"] < 15


def outcome(model: Any, **options: Any) -> Any:
    try:
        return call(model, 2, **options)
    except AssertionError as error:
        return str(error)


def use_caches(rank: int, count: int, method: str, axis: str) -> dict[str, Any]:
    heads, found = Heads(axis, rank, method), dict[str, Any]()
    for offloaded in ("offloaded", "offloaded_static"):  # without a GPU, a block fails in its first call
        plain, model = heads.plain("gemma3_text"), heads.sharded("gemma3_text")
        expected, got = (outcome(one, cache_implementation=offloaded) for one in (plain, model))
        found[offloaded] = expected == got or same(expected, got, CLOSE[axis])
    plain, model = heads.plain("llama"), heads.sharded("llama")
    quantized: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    kinds = {"quantized": quantized, "quantized beams": {**quantized, "num_beams": 3}}
    for name, options in kinds.items() if axis == STAGES else ():
        found[name] = same(call(plain, 2, **options), call(model, 2, **options), 0.0)
    mistakes: dict[str, Callable[[], Any]] = {
        "generate_batch": lambda: model.generate_batch([[5, 6, 7]]),
        "cache_implementation": lambda: model.generate(torch.tensor([[5, 6, 7]]), cache_implementation="paged"),
    }
    if axis == TENSOR:
        mistakes["quantized"] = lambda: call(model, **quantized)
    else:
        uneven = families.make("lfm2", layer_types=["conv", "conv", "full_attention", "full_attention"])
        shard_decoder(uneven, heads.runtime, lay_out_decoder(uneven, heads.config), heads.config)
        mistakes["assisted"] = lambda: call(uneven, prompt_lookup_num_tokens=3)
    found["errors"] = errors_of(mistakes)
    found["right after errors"] = same(call(plain), call(model), CLOSE[axis])
    return found


@pytest.mark.parametrize("axis", [STAGES, TENSOR])
def test_caches(axis: str) -> None:
    for found in run_ranks(2, use_caches, axis):
        errors = {name: str(text) for name, text in found.pop("errors").items()}
        assert len(found) == (5 if axis == STAGES else 3)
        assert all(found.values()), found
        for name in ("generate_batch", "cache_implementation"):
            assert errors[name].startswith("generate_batch: continuous batches of transformers run in a thread"), name
        if axis == STAGES:
            assert "assisted decoding: stage 0 has no DynamicLayer" in errors["assisted"] or (
                "assisted decoding: stage 1 has no LinearAttentionLayer" in errors["assisted"]
            )
        else:
            assert "cache_implementation='quantized': the scales of quantized keys" in errors["quantized"]
