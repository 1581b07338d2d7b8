"""Batches that sequences join and leave: tokens are those of `generate` for each prompt alone, on one rank and over
stages and tensor ranks."""

from __future__ import annotations

from typing import Any

import pytest

from shardit import DiffusionParallelConfig, InputError, SamplingParams
from shardit.core.comm.mesh import init_mesh
from shardit.core.stages.runtime import Runtime
from shardit.language.request.rows import PromptGroup, PromptRow
from shardit.language.sharding import lay_out_decoder, shard_decoder
from tests.language import families
from tests.language.batched import alone, batcher_of, continued, outputs, prompts_of, reuses, run
from tests.support.ranks import run_ranks

NAMES = ("llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "mamba", "jamba", "gpt2")
CLOSED = ("bert", "bart", "recurrent_gemma", "rwkv")
"""Families whose rows cannot join a batch, for their masks or their states in modules."""


def rows(**changes: Any) -> list[PromptRow]:
    return prompts_of(families.VOCABULARY, **changes)


def long_rows(**changes: Any) -> list[PromptRow]:
    """Return short prompts with long texts, of which `TIGHT` holds two."""
    params = SamplingParams(max_tokens=40, ignore_eos=True, **{"temperature": 0.0, **changes})
    return [PromptRow(tuple(range(10 * length, 11 * length)), params, length) for length in (5, 6, 8, 9)]


TIGHT = 100


@pytest.mark.parametrize("name", NAMES + CLOSED)
def test_one_rank(name: str) -> None:
    model = families.make(name)
    expected = alone(model, rows())
    batcher = batcher_of(model, rows=3, tokens=16)
    assert batcher.limits.joins == (name not in CLOSED)
    assert [tokens for tokens, *_ in run(batcher, rows())] == expected
    assert len(set(expected)) == len(expected)  # control: swapped rows would be detected


def test_rotary_positions_that_follow_the_length() -> None:
    """Rows of other lengths would decide which of two sets of frequencies a text gets."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0], "original_max_position_embeddings": 16}
    rope = {"rope_theta": 1e4, "rope_type": "longrope", "partial_rotary_factor": 1.0, **factors}
    model = families.make("llama", rope_parameters=rope, max_position_embeddings=256)
    batcher = batcher_of(model, rows=3, tokens=16)
    assert not batcher.limits.joins
    assert [tokens for tokens, *_ in run(batcher, rows())] == alone(model, rows())


def test_preemption_changes_nothing_but_time() -> None:
    model = families.make("llama")
    sampled = long_rows(temperature=0.9, repetition_penalty=1.1, presence_penalty=0.5, logprobs=2)
    expected = run(batcher_of(model), sampled)
    batcher = batcher_of(model, rows=8, tokens=16, memory=TIGHT)
    found = outputs(batcher, sampled)
    made = [output.rows[0] for output in found]
    assert [row[:3] for row in made] == [row[:3] for row in expected]
    assert sum(output.preemptions for output in found) > 1
    for got, wanted in zip(made, expected, strict=True):
        assert [list(one) for one in got[3] or ()] == [list(one) for one in wanted[3] or ()]
        assert len(got[3] or ()) == len(got[0])


def test_texts_continue_from_their_tokens() -> None:
    """As after a restart of the ranks."""
    model = families.make("llama")
    for params in ({}, {"temperature": 0.8, "top_k": 20, "frequency_penalty": 0.3}):
        wanted = rows(**params)
        expected = continued(model, wanted)
        halves = [
            PromptRow(row.prompt, row.params, row.seed, tokens[: len(tokens) // 2])
            for row, tokens in zip(wanted, expected, strict=True)
        ]
        assert continued(model, halves) == expected
        ended = [
            PromptRow(row.prompt, row.params, row.seed, tokens) for row, tokens in zip(wanted, expected, strict=True)
        ]
        assert continued(model, ended) == expected


def test_a_cancelled_request_leaves_at_the_next_step() -> None:
    model = families.make("llama")
    batcher = batcher_of(model, rows=8)
    seen: list[int] = []

    def pause() -> None:
        seen.append(sum(len(group.rows) for group in batcher.scheduler.groups))
        if len(seen) == 3:
            batcher.cancel(2)

    found = []
    batcher.on_end = lambda key, _: found.append(key)
    for key, row in enumerate(rows()):
        batcher.add(key, PromptGroup((row,)), lambda *_: None)
    batcher.pause = pause
    program = batcher.program()
    assert program is not None
    assert batcher.program() is None
    program.run()
    assert sorted(found) == [0, 1, 3, 4, 5, 6, 7]
    assert batcher.scheduler.used == 0


def test_a_request_cancelled_while_its_token_travels() -> None:
    """It gets no token, and is not mistaken for one that goes on."""
    model = families.make("llama")
    batcher = batcher_of(model, rows=8)
    choose = batcher._choose

    def cancelled(sequences: Any, logits: Any) -> list[int]:
        made = choose(sequences, logits)
        batcher.cancel(3)
        return made

    batcher._choose = cancelled
    found = []
    batcher.on_end = lambda key, _: found.append(key)
    for key, row in enumerate(rows()):
        batcher.add(key, PromptGroup((row,)), lambda *_: None)
    program = batcher.program()
    assert program is not None
    assert batcher.program() is None
    program.run()
    assert sorted(found) == [0, 1, 2, 4, 5, 6, 7]


def over_ranks(rank: int, count: int, method: str, config: DiffusionParallelConfig, names: Any) -> dict[str, Any]:
    mesh = init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method)
    found: dict[str, Any] = {}
    for name in names:
        plain, model = families.make(name), families.make(name)
        expected = alone(plain, rows())
        runtime = Runtime.of(mesh, split_batch=False)
        shard_decoder(model, runtime, lay_out_decoder(model, config), config)
        batcher = batcher_of(model, runtime, rows=3, tokens=16, groups=2)
        tight = batcher_of(model, runtime, rows=8, tokens=16, groups=2, memory=TIGHT)
        crowded = outputs(tight, long_rows(), runtime)
        found[name] = [
            [tokens for tokens, *_ in run(batcher, rows(), runtime)] == expected,
            [output.rows[0][0] for output in crowded] == continued(plain, long_rows()),
        ]
        turns = [
            PromptRow(tuple(range(3, 3 + length)), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), 0)
            for length in (40, 99, 60)
        ]
        alike = batcher_of(model, runtime)
        reused = reuses(alike)
        found[name].append(
            [run(alike, [one], runtime)[0][0] for one in turns] == [continued(plain, [one])[0] for one in turns]
        )
        found[f"{name} reused"] = sum(reused)
        found[f"{name} logprobs"] = run(batcher, rows(logprobs=1)[:2], runtime)
        found[f"{name} preempted"] = sum(output.preemptions for output in crowded)
    return found


@pytest.mark.parametrize("axis", ["pipeline_parallel_size", "tensor_parallel_size"])
def test_over_ranks(axis: str) -> None:
    names = ("llama", "gemma3_text", "qwen3_next", "mamba", "rwkv") if axis.startswith("pipe") else ("llama", "jamba")
    found = run_ranks(2, over_ranks, DiffusionParallelConfig(**{axis: 2}), names, timeout=240)
    for rank in found:
        assert all(all(rank[name]) for name in names), rank
    assert found[0] == found[1]  # results with logprobs too
    assert found[0]["llama preempted"] > 0
    assert found[0]["llama reused"] >= 40 + 59


def test_prompts_that_begin_alike() -> None:
    """Turns of a conversation, and prompts with one head: the keys of the head are not computed again."""
    model = families.make("llama")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    head = tuple(range(3, 53))
    first = PromptRow(head, params, 0)
    batcher = batcher_of(model)
    reused = reuses(batcher)
    ((answer, *_),) = run(batcher, [first])
    turns = [
        PromptRow((*head, *answer, 7, 8), params, 0),
        PromptRow((*head[:40], 99, 98), params, 0),
        PromptRow(head[::-1], params, 0),
    ]
    expected = [continued(model, [row])[0] for row in turns]
    assert [tokens for tokens, *_ in run(batcher, turns)] == expected
    assert sorted(reused) == [40, len(head) + len(answer) - 1]
    batcher.prefixes.shrink(0)
    assert batcher.prefixes.bytes == 0


def test_a_head_that_is_forgotten_while_a_prompt_begins() -> None:
    model = families.make("llama")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    head = tuple(range(3, 53))
    batcher = batcher_of(model)
    run(batcher, [PromptRow(head, params, 0)])
    reused = reuses(batcher)
    choose = batcher._choose

    def forgetful(sequences: Any, logits: Any) -> list[int]:
        if any(group.prefill is not None for group in batcher.scheduler.groups):
            batcher.prefixes.shrink(0)
        return choose(sequences, logits)

    batcher._choose = forgetful
    prompts = [PromptRow((9, 8, 7), params, 0), PromptRow((*head, 7), params, 0)]
    made = [tokens for tokens, *_ in run(batcher, prompts)]
    assert made == [continued(model, [row])[0] for row in prompts]
    assert reused == [50]


def test_windows_and_states_keep_no_head() -> None:
    for name, longest in (("gemma3_text", 7), ("qwen3_next", 0), ("mamba", 0)):
        assert batcher_of(families.make(name)).prefixes.longest == longest


def test_a_bias_on_logits() -> None:
    model = families.make("llama")
    plain = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompt = (5, 6, 7)
    ((made, *_),) = run(batcher_of(model), [PromptRow(prompt, plain, 0)])
    banned = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias=dict.fromkeys(made, -100.0))
    forced = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={9: 100.0})
    (without, *_), (nine, *_) = run(batcher_of(model), [PromptRow(prompt, banned, 0), PromptRow(prompt, forced, 0)])
    assert not set(made) & set(without)
    assert nine == (9,) * 6
    with pytest.raises(InputError, match="logit_bias must be numbers by tokens"):
        SamplingParams(logit_bias={"a": 1.0})  # pyright: ignore[reportArgumentType]


def test_the_request_that_used_up_the_memory_is_named() -> None:
    """That of the prompt that is computed; of several texts none."""
    model = families.make("llama")
    batcher = batcher_of(model, rows=8, tokens=4)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for key, length in enumerate((3, 3, 20)):
        batcher.add(key, PromptGroup((PromptRow(tuple(range(3, 3 + length)), params, 0),)), lambda *_: None)
    found: list[set[int]] = []
    program = batcher.program()
    assert program is not None
    assert batcher.program() is None
    batcher.pause = lambda: found.append(batcher.suspects(program))
    program.run()
    assert {2} in found
    assert {0, 1, 2} in found
    batcher.ended(program)
    assert batcher.suspects(program) == set()
