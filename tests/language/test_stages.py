"""Language models over stages: unmodified `generate` on every rank is bitwise equal to one rank."""

from __future__ import annotations

import copy
import io
import time
from contextlib import redirect_stdout
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

import shardit
from shardit import DiffusionParallelConfig, InputError, RankError, UnsupportedError
from shardit.core.comm.mesh import init_mesh
from shardit.core.decoder import stage_tensor
from shardit.core.stages.runtime import Runtime
from shardit.language.sharding import lay_out_decoder, owners_of, shard_decoder
from tests.language import families
from tests.language.batched import run_interleaved
from tests.language.cases import CASES, Case, compare, errors_of
from tests.language.folders import tokenizer
from tests.support.ranks import run_ranks

FAST = ("llama", "gemma2", "gpt_oss", "mamba", "qwen3_next", "deepseek_v3", "gpt2", "gemma4_text", "zamba2")
"""Grouped-query attention, sliding windows, experts, state space models, hybrids, latent attention, learned positions,
keys shared by layers."""

TWO = DiffusionParallelConfig(pipeline_parallel_size=2)


def started(rank: int, count: int, method: str) -> Runtime:
    config = DiffusionParallelConfig(pipeline_parallel_size=count)
    return Runtime.of(init_mesh(config, device="cpu", timeout_s=30, rank=rank, init_method=method), split_batch=False)


def make_sharded(name: str, runtime: Runtime, **changes: Any) -> Any:
    model = families.make(name, **changes)
    config = DiffusionParallelConfig(pipeline_parallel_size=runtime.mesh.pp_size)
    shard_decoder(model, runtime, lay_out_decoder(model, config), config)
    return model


def compare_families(rank: int, count: int, method: str, names: tuple[str, ...]) -> list[Any]:
    runtime, found = started(rank, count, method), []
    for name in names:
        model = make_sharded(name, runtime)
        results = {case.name: compare(families.make(name), model, case) for case in CASES}
        stages = model.shardit_decoder.stages
        own = {index for index, owner in enumerate(stages.owners) if owner == rank}
        others = tuple(f"{stages.blocks[index][0]}." for index in range(len(stages.owners)) if index not in own)
        held = [(path, p) for path, p in model.named_parameters(remove_duplicate=False) if not p.is_meta]
        mine = {id(p) for path, p in held if not path.startswith(others)}  # a head may be tied to the embedding
        foreign = [path for path, p in held if id(p) not in mine]
        found.append((name, results, set(stages.ran) == own, foreign, len(mine)))
    return found


@pytest.mark.parametrize(("count", "names"), [(2, FAST), (3, ("llama", "falcon_h1"))])
def test_bitwise_equal_to_one_rank(count: int, names: tuple[str, ...]) -> None:
    of_ranks = run_ranks(count, compare_families, names)
    for found in of_ranks:
        for name, results, ran_own, foreign, held in found:
            allowed = {"right", "not on one rank"}
            assert {case: how for case, how in results.items() if how not in allowed} == {}, name
            assert list(results.values()).count("right") >= len(CASES) - 1, (name, results)
            assert ran_own, name
            assert held
            assert foreign == [], name


def compare_changed_layer(rank: int, count: int, method: str) -> str:
    """Compare a model with changed weights on the last stage, as a control."""
    model = make_sharded("llama", started(rank, count, method))
    if rank == count - 1:
        model.model.layers[-1].mlp.up_proj.weight.data += 0.5
    return compare(families.make("llama"), model, CASES[0])


def test_changed_weights_on_one_rank_are_detected() -> None:
    assert run_ranks(2, compare_changed_layer) == ["WRONG", "WRONG"]


class Clock(StoppingCriteria):
    """Stops at a different step on each rank, like a criterion that reads the time."""

    def __init__(self, steps: int):
        self.steps = steps

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.steps -= 1
        return torch.full((input_ids.shape[0],), self.steps <= 0)


class Broken(StoppingCriteria):
    """Fails on one rank at its second call."""

    def __init__(self, here: bool):
        self.here, self.calls = here, 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.here and self.calls == 2:
            raise KeyError("broken")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Printer(BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        print(value.tolist())

    def end(self) -> None:
        print("end")


class Reader(LogitsProcessor):
    """Decides by values read in Python."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row in range(scores.shape[0]):
            best = int(scores[row].argmax())
            scores[row, best] = float("-inf") if best % 2 else scores[row, best]
        return scores


def use_options(rank: int, count: int, method: str) -> dict[str, Any]:
    """Use options of `generate`, and call the model, on one rank and over stages."""
    runtime = started(rank, count, method)
    plain, model = families.make("llama"), make_sharded("llama", runtime)
    ids = torch.randint(3, families.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
    call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    found: dict[str, Any] = {}

    stopped = model.generate(ids, stopping_criteria=StoppingCriteriaList([Clock(3 + 2 * rank)]), **call)
    found["steps"] = stopped.shape[1] - ids.shape[1]
    began = time.monotonic()
    model.generate(ids, **{**call, "max_new_tokens": 100_000, "max_time": 0.2})
    found["time"] = time.monotonic() - began

    printed = io.StringIO()
    with redirect_stdout(printed):
        model.generate(ids[:1], streamer=Printer(), do_sample=False, max_new_tokens=3)
    found["printed"] = printed.getvalue().count("end")

    reads = LogitsProcessorList([Reader()])
    expected = plain.generate(ids, logits_processor=reads, **call)
    found["processor"] = torch.equal(expected, model.generate(ids, logits_processor=reads, **call))
    marked = {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash"), **call}
    with mock.patch.object(stage_tensor, "SMALL", 16):  # as if the vocabulary were large
        found["watermark"] = torch.equal(plain.generate(ids, **marked), model.generate(ids, **marked))
        parts = [{"inputs_embeds": one.get_input_embeddings()(ids)} for one in (plain, model)]
        found["own embeddings"] = torch.equal(plain.generate(**parts[0], **call), model.generate(**parts[1], **call))

    with torch.no_grad():
        first, own = plain(ids), model(ids)
        again, own_again = copy.deepcopy(first.cache), copy.deepcopy(own.cache)
        token = ids[:, :1]
        found["calls"] = torch.equal(first.logits, own.logits) and type(own.logits) is torch.Tensor
        second, own_second = plain(token, past_key_values=first.cache), model(token, past_key_values=own.cache)
        found["next call"] = torch.equal(second.logits, own_second.logits)
        other = plain(token + 1, past_key_values=again).logits
        found["copied cache"] = torch.equal(other, model(token + 1, past_key_values=own_again).logits)
        embedded = plain.get_input_embeddings()(ids)
        found["inputs_embeds"] = torch.equal(first.logits, model(inputs_embeds=embedded).logits)

    found |= errors_of(
        {
            "other prompts": lambda: model.generate(ids + rank, **call),
            "save": lambda: model.save_pretrained("nowhere"),
        }
    )
    broken = StoppingCriteriaList([Broken(rank == 1)])
    with pytest.raises((KeyError, RankError)) as failure:
        model.generate(ids, stopping_criteria=broken, **call)
    found["criterion"] = f"{type(failure.value).__name__}: {failure.value}"
    found["right after errors"] = torch.equal(plain.generate(ids, **call), model.generate(ids, **call))
    return found


def test_options_of_generate_and_calls() -> None:
    first, second = run_ranks(2, use_options)
    assert first["steps"] == second["steps"] == 3
    assert first["time"] < 5
    assert (first["printed"], second["printed"]) == (1, 0)
    assert first["criterion"] == "RankError: rank 1 failed: a stopping criterion failed: KeyError: 'broken'"
    assert second["criterion"] == "KeyError: 'broken'"
    for found in (first, second):
        assert found["watermark"]
        assert found["own embeddings"]
        for name in ("processor", "calls", "next call", "copied cache", "inputs_embeds", "right after errors"):
            assert found[name], name
        assert "ranks differ in inputs of LlamaForCausalLM.generate" in found["other prompts"]
        assert "save_pretrained: each rank holds only its own part" in found["save"]


def compare_groups(rank: int, count: int, method: str) -> list[bool]:
    """Compare interleaved groups of prompts, greedy and with a seed each, with each group alone on one rank."""
    runtime = started(rank, count, method)
    plain, model = families.make("llama"), make_sharded("llama", runtime)
    generator = torch.Generator().manual_seed(4)
    groups = [torch.randint(3, families.VOCABULARY, (3, length), generator=generator) for length in (5, 11, 8)]
    found = []
    for sampling in (False, True):
        options = {"do_sample": sampling, "max_new_tokens": 7}

        def run(model: Any, ids: torch.Tensor, options: dict[str, Any] = options) -> torch.Tensor:
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

        expected = []
        for seed, ids in enumerate(groups):
            torch.manual_seed(seed)
            expected.append(run(plain, ids))
        made = run_interleaved(runtime, [lambda ids=ids: run(model, ids) for ids in groups], [0, 1, 2])
        found += [torch.equal(one, other) for one, other in zip(expected, made, strict=True)]
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_interleaved_groups_are_bitwise_equal_to_each_alone(count: int) -> None:
    assert run_ranks(count, compare_groups) == [[True] * 6] * count


def compare_loops(rank: int, count: int, method: str) -> dict[str, bool]:
    """Compare custom loops: with a static cache allocated before the first call, and without the head."""
    runtime = started(rank, count, method)
    start = torch.arange(10, 18).reshape(2, 4)

    def static(model: Any) -> torch.Tensor:
        config, ids, found = model.config, start, []
        cache = StaticCache(config=config, max_cache_len=32)
        cache.early_initialization(2, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
        for _ in range(4):
            found.append(model(ids, past_key_values=cache).logits)
            ids = found[-1][:, -1:].argmax(-1)
        return torch.cat(found, 1)

    def headless(model: Any) -> torch.Tensor:
        ids, cache, found = start, None, []
        for _ in range(4):
            out = model.model(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.cache, ids[:, -1:] + 1
            found.append(out.last_hidden_state)
        return torch.cat(found, 1)

    results = {}
    for name, loop in {"static": static, "headless": headless}.items():
        for mode in (torch.no_grad, torch.inference_mode):
            plain, model = families.make("qwen3"), make_sharded("qwen3", runtime)
            with mode():
                expected, got = loop(plain), loop(model)
            results[f"{name} {mode.__name__}"] = type(got) is torch.Tensor and torch.equal(expected, got)
    return results


def test_custom_loops() -> None:
    for results in run_ranks(2, compare_loops):
        assert len(results) == 4
        assert all(results.values()), results


def compare_number_formats(rank: int, count: int, method: str) -> list[bool]:
    """Change the number format, and the mode of torch, after calls in another; call with a token beyond the
    vocabulary."""
    plain, model = families.make("llama"), make_sharded("llama", started(rank, count, method))
    ids = torch.arange(3, 13).view(2, 5)

    def same() -> bool:
        expected, got = (
            one.generate(ids, do_sample=False, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
            for one in (plain, model)
        )
        return all(map(torch.equal, expected.logits, got.logits))

    found = [same(), same(), same()]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(same())
    for dtype in (torch.bfloat16, torch.float32):
        plain.to(dtype)
        model.to(dtype)
        found.append(same())
    for call in (model.generate, model):
        for wrong in (999, -1):
            with pytest.raises(InputError, match=f"the token {wrong}, and those of LlamaForCausalLM go from 0 to 127"):
                call(torch.tensor([[5, wrong]]))
    return [*found, same()]


def test_number_formats_and_tokens_of_later_calls() -> None:
    assert run_ranks(2, compare_number_formats) == [[True] * 7] * 2


def compare_head_stage(rank: int, count: int, method: str) -> tuple[list[int], list[bool]]:
    """Compare groups of one shape: their calls of the head differ only in data."""
    runtime = started(rank, count, method)
    plain, model = families.make("llama", vocab_size=20_000), make_sharded("llama", runtime, vocab_size=20_000)
    groups = [torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(k)) for k in range(4)]

    def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)

    expected = [run(plain, ids) for ids in groups]
    made = run_interleaved(runtime, [lambda ids=ids: run(model, ids) for ids in groups], [0] * 4)
    same = [torch.equal(one, other) for one, other in zip(expected, made, strict=True)]
    return model.shardit_decoder.stages.owners, same


def test_separate_stage_for_the_head() -> None:
    for owners, same in run_ranks(3, compare_head_stage):
        assert owners == [0, 1, 1, 1, 1, 2]
        assert same == [True] * 4


def use_parallelize(rank: int, count: int, method: str) -> list[Any]:
    init_mesh(TWO, device="cpu", timeout_s=30, rank=rank, init_method=method)
    model = shardit.parallelize(families.make("qwen3"), TWO, timeout_s=30)
    again = shardit.parallelize(model, TWO, timeout_s=30)
    found: list[Any] = [again is model, compare(families.make("qwen3"), model, CASES[0])]
    try:
        shardit.parallelize(model, pipeline_parallel_size=2, data_parallel_size=2)
    except InputError as error:
        found.append(str(error))
    for config in (
        DiffusionParallelConfig(pipeline_parallel_size=2, layer_partition=[1, 3]),
        DiffusionParallelConfig(pipeline_parallel_size=2, layer_partition=[1, 2]),
    ):
        other = families.make("qwen3")
        try:
            stages = shardit.parallelize(other, config, timeout_s=30).shardit_decoder.stages
            found.append(stages.owners)
        except InputError as error:
            found.append(str(error))
    return found


def test_parallelize() -> None:
    for same, bits, changed, owners, wrong in run_ranks(2, use_parallelize):
        assert same
        assert bits == "right"
        assert "is sharded with DiffusionParallelConfig" in changed
        assert owners == [0, 0, 1, 1, 1, 1]
        assert "layer_partition" in wrong
        assert "4" in wrong


def test_stages_are_balanced_with_a_large_vocabulary() -> None:
    config = families.config_of("llama")
    config.vocab_size, config.num_hidden_layers, config.hidden_size = 50_000, 8, 64
    with torch.device("meta"):
        model = families.transformers.AutoModelForCausalLM.from_config(config)
    owners = owners_of(model, DiffusionParallelConfig(pipeline_parallel_size=4))
    assert owners[0] == 0
    assert owners[1] == 1  # the embedding alone is more than a fourth
    assert owners[-1] == 3
    assert owners[-2] == 2


def test_unsupported_configurations() -> None:
    model = families.make("llama")
    with pytest.raises(UnsupportedError, match="ulysses_degree=2: a language model runs over pipeline_parallel_size"):
        owners_of(model, DiffusionParallelConfig(pipeline_parallel_size=2, ulysses_degree=2))
    with pytest.raises(UnsupportedError, match="pipeline_parallel_size=8 is more than the 4 blocks"):
        owners_of(model, DiffusionParallelConfig(pipeline_parallel_size=8))


def differ_or_stream(rank: int, count: int, method: str) -> dict[str, Any]:
    """Give ranks other generation configurations; give all ranks streamers."""
    model, ids = make_sharded("llama", started(rank, count, method), vocab_size=259), torch.arange(10, 24).reshape(2, 7)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": 4}
    own = GenerationConfig(max_new_tokens=3 + 2 * rank, pad_token_id=0)

    def of_model() -> Any:
        model.generation_config.eos_token_id = [5 + rank]
        try:
            return model.generate(ids, **options)
        finally:
            model.generation_config.eos_token_id = None

    mistakes = {
        "given": lambda: model.generate(ids, generation_config=own, attention_mask=options["attention_mask"]),
        "model's": of_model,
    }
    found: dict[str, Any] = errors_of(mistakes)
    tokens = tokenizer()
    with pytest.raises(ValueError, match="batch size 1") as caught:
        model.generate(ids, streamer=TextStreamer(tokens), **options)
    found["streamer"] = str(caught.value)
    first = {**options, "attention_mask": options["attention_mask"][:1]}
    texts = TextIteratorStreamer(tokens, timeout=20)
    model.generate(ids[:1], streamer=texts, **first)
    found["text"] = "".join(texts)
    return found


def test_configurations_that_differ_and_streamers_of_all_ranks() -> None:
    first, second = run_ranks(2, differ_or_stream)
    for found in (first, second):
        assert "ranks differ in generation_config of" in found["given"]
        assert "ranks differ in model.generation_config of" in found["model's"]
    assert first["streamer"] == second["streamer"]
    assert first["text"]
    assert second["text"] == ""


def cross_window(rank: int, count: int, method: str, name: str) -> list[bool]:
    """Generate over the sliding window of 8 tokens, after a shorter prompt, with layers that share keys."""
    model, plain, found = make_sharded(name, started(rank, count, method)), families.make(name), []
    for batch, length, new in ((1, 4, 6), (2, 4, 12), (2, 9, 3), (2, 4, 6)):
        ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
        found.append(torch.equal(plain.generate(ids, **options), model.generate(ids, **options)))
    return found


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n_text"])
def test_shared_keys_beyond_a_window(name: str) -> None:
    assert run_ranks(2, cross_window, name) == [[True] * 4] * 2


def compare_lengths_of_chunks(rank: int, count: int, method: str) -> list[str]:
    """xLSTM returns states with gaps in memory where the length is a multiple of its chunk of 8 tokens."""
    runtime, cases = started(rank, count, method), [Case("no cache", {"use_cache": False}, length=n) for n in (16, 21)]
    return [compare(families.make("xlstm"), make_sharded("xlstm", runtime), case) for case in cases]


def test_results_with_gaps_in_memory() -> None:
    assert run_ranks(2, compare_lengths_of_chunks) == [["right", "right"]] * 2
