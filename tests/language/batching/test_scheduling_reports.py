"""What people met with schedulers of other engines: requests that never advance, chunks that wait for each other,
preemption that changes texts."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from shardit import LLM, DiffusionParallelConfig, InputError, SamplingParams
from shardit.core.comm.mesh import init_mesh
from shardit.core.decoder.decoder_stages import DecoderStages
from shardit.core.stages.runtime import Runtime
from shardit.language.request.rows import PromptRow
from shardit.language.sharding import lay_out_decoder, shard_decoder
from tests.language import families
from tests.language.batched import batcher_of, run
from tests.support.ranks import run_ranks

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.full)])
def test_always_progress(stages: int) -> None:
    """The smallest limits, and a prompt of seven chunks."""
    prompts = [[3 + k % 200 for k in range(50)], [5, 6, 7], [9]]
    with LLM("tiny/llama", device="cpu", timeout_s=60) as one:
        expected = [output.outputs[0].token_ids for output in one.generate(prompts, GREEDY)]
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 8}
    with LLM("tiny/llama", pipeline_parallel_size=stages, device="cpu", timeout_s=60, **limits) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)] == expected


def test_a_full_cache_changes_nothing_but_time() -> None:
    """A limit that holds two of four requests; a stream shows each token once."""
    prompts = [[3 + k for k in range(length)] for length in (5, 6, 8, 9)]
    params = [SamplingParams(temperature=0.8, seed=7, max_tokens=40, ignore_eos=True, n=n) for n in (1, 2, 1, 1)]
    with LLM("tiny/llama", device="cpu", timeout_s=60) as llm:
        expected = llm.generate(prompts, params)
        row = llm.generate([[3] * 2], GREEDY)[0]
        assert len(row.outputs[0].token_ids) == 6
    bytes_of_a_token = 2 * 4 * 2 * 16 * 4  # keys and values, layers, heads, size, float32
    with LLM("tiny/llama", device="cpu", timeout_s=60, max_model_len=60, kv_cache_memory=100 * bytes_of_a_token) as llm:
        made = llm.generate(prompts, params)
        assert made == expected
        pieces: dict[tuple[int, int], list[int]] = {}
        for piece in llm.stream(prompts, params):
            pieces.setdefault((piece.prompt_index, piece.index), []).extend(piece.token_ids)
        for number, output in enumerate(expected):
            for one in output.outputs:
                assert tuple(pieces[number, one.index]) == one.token_ids
    with pytest.raises(InputError, match=r"kv_cache_memory=10 is too small: rank 0 needs [\d,]+ bytes"):
        LLM("tiny/llama", device="cpu", kv_cache_memory=10)


def chunks_over_stages(rank: int, count: int, method: str) -> dict[str, Any]:
    """Compute a prompt of four chunks; return when this rank began and ended each, and its messages."""
    config = DiffusionParallelConfig(pipeline_parallel_size=2)
    mesh = init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method)
    model = families.make("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    runtime = Runtime.of(mesh, split_batch=False)
    shard_decoder(model, runtime, lay_out_decoder(model, config), config)
    batcher = batcher_of(model, runtime, tokens=64)
    row = PromptRow(tuple(k % 100 for k in range(256)), SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), 0)
    run(batcher, [row], runtime)
    batcher.prefixes.shrink(0)
    spans: list[tuple[float, float]] = []
    own = DecoderStages._own

    def timed(self: DecoderStages, *args: Any) -> Any:
        begun = time.perf_counter()
        try:
            return own(self, *args)
        finally:
            spans.append((begun, time.perf_counter()))

    DecoderStages._own = timed
    before = runtime.comm.messages
    run(batcher, [row], runtime)
    per_chunk = len(spans) // 4
    assert torch.is_grad_enabled()
    return {
        "chunks": [(spans[per_chunk * k][0], spans[per_chunk * (k + 1) - 1][1]) for k in range(4)],
        "messages": runtime.comm.messages - before,
    }


def test_chunks_of_a_prompt_overlap_in_the_stages() -> None:
    first, last = run_ranks(2, chunks_over_stages, timeout=120)
    for chunk in range(3):
        assert first["chunks"][chunk + 1][0] < last["chunks"][chunk][1]
    assert last["messages"] == 1  # the token of the last chunk: the others send nothing back
