"""Log probabilities of prompts: in chunks, beside other prompts, pushed out, with known heads, over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardit import LLM, DiffusionParallelConfig, InputError, SamplingParams
from shardit.core.comm.mesh import init_mesh
from shardit.core.stages.runtime import Runtime
from shardit.language.request.outputs import GroupOutput
from shardit.language.request.rows import PromptRow
from shardit.language.sharding import lay_out_decoder, shard_decoder
from tests.language import families
from tests.language.batched import batcher_of, outputs, reuses
from tests.support.ranks import run_ranks

LENGTHS = (1, 2, 3, 9, 17, 40)
CLOSE = 2e-5
"""Maximum distance of log probabilities: chunks and padding change their last bits."""


def rows(**changes: Any) -> list[PromptRow]:
    """Prompts of which every second one wants log probabilities of its tokens."""
    generator, found = torch.Generator().manual_seed(5), []
    for number, length in enumerate(LENGTHS):
        prompt = torch.randint(3, families.VOCABULARY, (length,), generator=generator).tolist()
        options = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **changes}
        found += [
            PromptRow(tuple(prompt), SamplingParams(prompt_logprobs=2, **options), number),
            PromptRow(tuple(prompt[::-1]), SamplingParams(logprobs=1, **options), number),
        ]
    return found


def distance(plain: Any, row: PromptRow, output: GroupOutput) -> float:
    """Return the largest distance from the log probabilities of plain transformers; 99 for other tokens."""
    with torch.no_grad():
        likely = torch.log_softmax(plain(torch.tensor([row.prompt])).logits[0].float(), -1)
    (found,) = output.prompt_logprobs
    if row.params.prompt_logprobs is None or len(row.prompt) == 1:
        return 99.0 if found is not None else 0.0
    worst = 0.0 if found is not None and len(found) == len(row.prompt) - 1 else 99.0
    for expected, token, values in zip(likely, row.prompt[1:], found or (), strict=False):
        wanted = {token, *expected.topk(2).indices.tolist()}
        if set(values) != wanted or next(iter(values)) != token:
            return 99.0
        worst = max(worst, *(abs(expected[one].item() - value) for one, value in values.items()))
    return worst


def check(plain: Any, given: list[PromptRow], found: list[GroupOutput]) -> float:
    return max(distance(plain, row, output) for row, output in zip(given, found, strict=True))


@pytest.mark.parametrize("limits", [{}, {"tokens": 8}, {"tokens": 16, "rows": 2, "groups": 2}, {"memory": 70}])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "rwkv", "falcon_h1", "bamba"])
def test_equal_to_a_call_of_the_model(name: str, limits: dict[str, Any]) -> None:
    model, given = families.make(name), rows()
    found = outputs(batcher_of(model, **limits), given)
    assert check(families.make(name), given, found) < CLOSE
    assert sum(output.preemptions for output in found) > 0 or "memory" not in limits or name in ("rwkv", "bamba")
    plain = [PromptRow(row.prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), 0) for row in given]
    expected = [output.rows[0][0] for output in outputs(batcher_of(model, **limits), plain)]
    assert [output.rows[0][0] for output in found] == expected
    assert check(families.make(name, seed=1), given, found) > 0.01  # a control


def test_known_heads_are_computed_again_for_them() -> None:
    model = families.make("llama")
    batcher, params = batcher_of(model), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    first = PromptRow(tuple(range(3, 60)), params, 0)
    outputs(batcher, [first])
    reused = reuses(batcher)
    row = PromptRow((*first.prompt, 7), SamplingParams(prompt_logprobs=2, max_tokens=4, ignore_eos=True), 0)
    assert check(families.make("llama"), [row], outputs(batcher, [row])) < CLOSE
    assert reused == []
    outputs(batcher, [PromptRow((*first.prompt, 8), params, 0)])
    assert reused == [57]


def over_ranks(rank: int, count: int, method: str, axis: str) -> Any:
    axes: dict[str, Any] = {axis: 2}
    config = DiffusionParallelConfig(**axes)
    runtime = Runtime.of(init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method), 1, False)
    model, given = families.make("llama"), rows()
    shard_decoder(model, runtime, lay_out_decoder(model, config), config)
    found = outputs(batcher_of(model, runtime, tokens=16, rows=3, groups=2), given, runtime)
    alone = outputs(batcher_of(families.make("llama"), tokens=16, rows=3, groups=2), given)
    scores = [output.prompt_logprobs for output in found]
    same = scores == [output.prompt_logprobs for output in alone]
    return check(families.make("llama"), given, found), same, scores


@pytest.mark.parametrize("axis", ["pipeline_parallel_size", "tensor_parallel_size"])
def test_over_ranks(axis: str) -> None:
    (first, same, scores), (second, _, others) = run_ranks(2, over_ranks, axis)
    assert max(first, second) < CLOSE
    assert scores == others
    assert same or axis.startswith("tensor")


def test_outputs() -> None:
    with LLM("tiny/llama", pipeline_parallel_size=2) as llm:
        params = SamplingParams(max_tokens=3, prompt_logprobs=1, n=2, seed=1)
        with_scores, without = llm.generate(["Once upon", "a time"], [params, SamplingParams(max_tokens=3)])
        assert with_scores.prompt_logprobs is not None
        assert with_scores.prompt_logprobs[0] is None
        for token, values in zip(with_scores.prompt_token_ids[1:], with_scores.prompt_logprobs[1:], strict=True):
            assert values is not None
            assert token in values
            assert len(values) in (1, 2)
        assert without.prompt_logprobs is None
        with pytest.raises(InputError, match="prompt_logprobs: pieces of texts have none"):
            next(llm.stream("Once", params))
        with pytest.raises(InputError, match="prompt_logprobs=100000 is more than the"):
            llm.generate("Once", SamplingParams(prompt_logprobs=100_000))
