"""Stages are balanced by the memory of weights and cache; a limit too small for one request is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from shardit import LLM, DiffusionParallelConfig, InputError, get_pp_indices
from shardit.language.cache_size import cache_bytes
from shardit.language.info import max_positions
from shardit.language.sharding import blocks_of, cache_of_stages, owners_of
from tests.language import families

LAYERS = 8


def wide_vocabulary() -> Any:
    """Return a model of 8 layers of width 64 with a vocabulary of 50,000."""
    config = LlamaConfig(
        vocab_size=50_000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def cached_tokens(model: Any, owners: list[int], memory: int) -> float:
    """Return the number of tokens that can be cached if each rank has `memory` bytes."""
    weights = dict.fromkeys(owners, 0)
    for (_, block), stage in zip(blocks_of(model), owners, strict=True):
        weights[stage] += sum(p.numel() * p.element_size() for p in block.parameters())
    per_token = cache_of_stages(model, owners, 1)
    return min(
        max(memory - weights[stage], 0) / per_token[stage] if per_token[stage] else float("inf") for stage in weights
    )


@pytest.mark.parametrize("stages", [2, 4])
def test_partition_maximizes_cached_tokens(stages: int) -> None:
    """In the least memory that fits the longest request, an even partition and that of vLLM cache no more tokens."""
    model = wide_vocabulary()
    owners = owners_of(model, DiffusionParallelConfig(pipeline_parallel_size=stages))
    assert owners == sorted(owners)
    assert set(owners) == set(range(stages))
    memory = next(m for m in range(0, 1 << 30, 1 << 16) if cached_tokens(model, owners, m) >= 2048)
    spans = [get_pp_indices(LAYERS, stage, stages) for stage in range(stages)]
    for counts in ([LAYERS // stages] * stages, [end - start for start, end in spans]):
        other = [stage for stage, count in enumerate(counts) for _ in range(count)]
        assert cached_tokens(model, [0, *other, stages - 1], memory) <= cached_tokens(model, owners, memory)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "mamba", "falcon_h1", "zaya"])
def test_bytes_of_a_cache(name: str) -> None:
    config = families.config_of(name)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    count, tokens = config.num_hidden_layers, 24
    expected = [0] * count
    if name != "mamba":
        with torch.no_grad():
            model(torch.zeros(1, tokens, dtype=torch.int64), past_key_values=cache)
        expected = [one.keys.nbytes + one.values.nbytes for one in cache.layers]  # pyright: ignore
    found = cache_bytes(config, count, 4, tokens)
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other) <= one // 8  # a window of 8 holds one token less between calls


def test_no_limit_of_positions() -> None:
    config = LlamaConfig(max_position_embeddings=-1)  # as XLNet has it
    assert max_positions(config) is None
    assert max_positions(LlamaConfig(max_position_embeddings=7)) == 7


def test_memory_limit_too_small() -> None:
    with pytest.raises(
        InputError, match=r"rank \d needs [\d,]+ bytes for weights and [\d,]+ for the cache of one request"
    ):
        LLM("tiny/llama", device="cpu", gpu_memory_utilization=1e-6, max_model_len=100)
    with pytest.raises(InputError, match="gpu_memory_utilization must be at most 1"):
        LLM("tiny/llama", gpu_memory_utilization=2)


def test_cache_over_tensor_ranks() -> None:
    """It is split by key heads, at least one per rank; a latent is replicated."""
    config = families.config_of("qwen3")
    assert config.num_key_value_heads == 2
    whole, two, four = (cache_bytes(config, 4, 4, 24, ranks) for ranks in (1, 2, 4))
    assert [2 * one for one in two] == whole
    assert four == two
    latent = families.config_of("deepseek_v3")
    assert cache_bytes(latent, 4, 4, 24, 2) == cache_bytes(latent, 4, 4, 24)
