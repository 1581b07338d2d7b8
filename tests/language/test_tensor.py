"""Language models over tensor ranks: unmodified `generate` gives the tokens of one rank on every rank."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

import shardit
from shardit import LLM, DiffusionParallelConfig, InputError, UnsupportedError
from shardit.core.comm.mesh import init_mesh
from shardit.core.stages.runtime import Runtime
from shardit.language.sharding import lay_out_decoder, query_heads, shard_decoder
from shardit.language.tensor import FAMILY, plan_decoder
from shardit.parallel.tensor.heads import Heads
from tests.language import families
from tests.language.batched import run_interleaved
from tests.language.cases import CASES, alike, compare, errors_of
from tests.language.folders import write
from tests.language.test_stages import Clock, Printer
from tests.support.ranks import run_ranks

CLOSE = 5e-5
TWO = DiffusionParallelConfig(tensor_parallel_size=2)
FOUR = DiffusionParallelConfig(tensor_parallel_size=4)
BOTH = DiffusionParallelConfig(pipeline_parallel_size=2, tensor_parallel_size=2)

FAST: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("qwen3", {"vocab_size": 1100, "tie_word_embeddings": True}),
    ("gpt_neox", {}),
    ("phi3", {}),
    ("gpt_oss", {}),
    ("mamba2", {}),
    ("mamba2", {"n_groups": 1}),
    ("mamba", {}),
    ("mixtral", {}),
    ("olmo2", {}),
    ("deepseek_v3", {}),
    ("gemma4_text", {}),
    ("gemma4_text", {"attention_k_eq_v": True}),
    ("gemma3n_text", {}),
    ("zamba2", {}),
    ("qwen3_next", {}),
    ("qwen3_5_text", {}),
    ("falcon_h1", {"mamba_n_groups": 1, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9]}),
    (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "ssm_multipliers": [2.0, 1.0, 1.0, 1.0, 0.5]},
    ),
)
"""Plain attention; a sliced tied vocabulary; fused queries, keys and values, in two orders; experts with biases and
sinks; states by groups, by heads that share one, and by channels; experts; norms across all heads; a latent shared by
all heads; layers over keys of others, and over keys that are the values, too; layers
whose number the caller names; a gate for each query head, and linear
attention by key heads, in two forms; factors of
channels and steps, without a norm and with one."""


def results(name: str, changes: dict[str, Any], config: DiffusionParallelConfig) -> tuple[dict[str, str], list[str]]:
    """Return the outcome of each case, and the reasons of modules that stay whole."""
    plain = families.make(name, **changes)
    model: Any = shardit.parallelize(families.make(name, **changes), config, timeout_s=60)
    found = {case.name: compare(plain, model, case, CLOSE) for case in CASES}
    return found, [*model.shardit_checks.whole.values(), *model.shardit_checks.plan.notes]


def compare_families(rank: int, count: int, method: str) -> list[Any]:
    init_mesh(TWO, device="cpu", timeout_s=60, rank=rank, init_method=method)
    found: list[Any] = []
    for name, changes in FAST:
        found.append((name, *results(name, changes, TWO)))
    return found


def test_tokens_equal_those_of_one_rank() -> None:
    for found in run_ranks(2, compare_families):
        for name, cases, notes in found:
            assert {case: text for case, text in cases.items() if text not in ("right", "not on one rank")} == {}, name
            assert list(cases.values()).count("right") >= len(CASES) - 1, name
            assert [note for note in notes if "tied" not in note] == [], name


def compare_on_four(rank: int, count: int, method: str) -> dict[str, Any]:
    """Compare models with more ranks than key heads, and stages of tensor ranks with groups in flight."""
    init_mesh(FOUR, device="cpu", timeout_s=60, rank=rank, init_method=method)
    found: dict[str, Any] = {name: results(name, {}, FOUR)[0] for name in ("qwen3", "phi3", "gemma4_text")}
    key: Any = shardit.parallelize(families.make("qwen3"), FOUR).model.layers[0].self_attn.k_proj.weight
    found["key heads"] = key.shape[0] // 8
    for name, changes in (("llama", {}), ("qwen3", {"vocab_size": 1100, "tie_word_embeddings": True}), ("mamba2", {})):
        found[f"stages {name}"] = results(name, changes, BOTH)[0]
    runtime = Runtime.of(init_mesh(BOTH, device="cpu", timeout_s=60), split_batch=False)
    plain, model = families.make("llama"), families.make("llama")
    shard_decoder(model, runtime, lay_out_decoder(model, BOTH), BOTH)
    groups = [torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(length)) for length in (5, 8)]

    def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=6)

    expected = []
    for seed, ids in enumerate(groups):
        torch.manual_seed(seed)
        expected.append(run(plain, ids))
    made = run_interleaved(runtime, [lambda ids=ids: run(model, ids) for ids in groups], [0, 1])
    same = [torch.equal(one, other) for one, other in zip(expected, made, strict=True)]
    found["groups"] = {str(number): "right" if equal else "WRONG" for number, equal in enumerate(same)}
    clock = StoppingCriteriaList([Clock(3 + 2 * rank)])
    out = model.generate(groups[0], stopping_criteria=clock, do_sample=False, max_new_tokens=8)
    found["steps"] = out.shape[1] - groups[0].shape[1]
    return found


def test_more_ranks_than_key_heads_and_stages_of_tensor_ranks() -> None:
    for found in run_ranks(4, compare_on_four):
        assert found.pop("key heads") == 1
        assert found.pop("steps") == 3
        for name, cases in found.items():
            assert set(cases.values()) == {"right"}, (name, cases)


class Stubborn(LogitsProcessor):
    """Prefers a different token on each rank, as code with its own random numbers may."""

    def __init__(self, rank: int):
        self.rank = rank

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, (input_ids[:, -1] + 5 + self.rank) % scores.shape[1]] = 1e4
        return scores


def with_lora(model: Any) -> Any:
    torch.manual_seed(5)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"]), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def use_decisions(rank: int, count: int, method: str) -> dict[str, Any]:
    """Use decisions of the first rank on all ranks, and calls that are refused."""
    init_mesh(TWO, device="cpu", timeout_s=60, rank=rank, init_method=method)
    plain = families.make("llama")
    model: Any = shardit.parallelize(families.make("llama"), TWO)
    ids = torch.arange(10, 24).reshape(2, 7)
    call: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    expected = plain.generate(ids, logits_processor=LogitsProcessorList([Stubborn(0)]), **call)
    got = model.generate(ids, logits_processor=LogitsProcessorList([Stubborn(rank)]), **call)
    found: dict[str, Any] = {"tokens of the first": torch.equal(expected, got)}
    clock = StoppingCriteriaList([Clock(3 + 2 * rank)])
    found["steps"] = model.generate(ids, stopping_criteria=clock, **call).shape[1] - ids.shape[1]
    began = time.monotonic()
    model.generate(ids, **{**call, "max_new_tokens": 100_000, "max_time": 0.2})
    found["time"] = time.monotonic() - began < 5
    printed = io.StringIO()
    with redirect_stdout(printed):
        model.generate(ids[:1], streamer=Printer(), do_sample=False, max_new_tokens=3)
    found["printed"] = printed.getvalue().count("end")
    # Last bits differ between machines: a head that is whole takes the first rank's result.
    with torch.no_grad():
        tied: Any = shardit.parallelize(families.make("llama", tie_word_embeddings=True), TWO)
        head = tied.get_output_embeddings()
        head.weight.data += rank
        found["bits"] = float(tied(ids).logits.double().sum())
    # Its attention fails on slices, and becomes whole, also if the headless model is called first.
    with torch.no_grad():
        expected = families.make("xglm").model(ids).last_hidden_state
        other: Any = shardit.parallelize(families.make("xglm"), TWO)
        found["layers alone"] = alike(expected, other.model(ids).last_hidden_state, CLOSE)
        found["became whole"] = sorted(other.shardit_checks.whole)
    plain_lora, lora = (with_lora(families.make("llama")) for _ in range(2))
    shardit.parallelize(lora, TWO)
    found["lora"] = compare(plain_lora, lora, CASES[0], CLOSE)
    found["lora matters"] = compare(plain, lora, CASES[0], CLOSE)
    found |= errors_of(
        {
            "other prompts": lambda: model.generate(ids + rank, **call),
            "save": lambda: model.save_pretrained("nowhere"),
            "config": lambda: shardit.parallelize(model, data_parallel_size=2, tensor_parallel_size=2),
        }
    )
    found["right after errors"] = compare(plain, model, CASES[0], CLOSE) == "right"
    return found


def test_first_rank_decides() -> None:
    first, second = run_ranks(2, use_decisions)
    assert (first["printed"], second["printed"]) == (1, 0)
    assert first["bits"] == second["bits"]
    for found in (first, second):
        assert found["tokens of the first"]
        assert found["steps"] == 3
        assert found["time"]
        assert found["right after errors"]
        assert found["layers alone"]
        assert found["became whole"] == [f"model.layers.{layer}.self_attn" for layer in range(4)]
        assert (found["lora"], found["lora matters"]) == ("right", "WRONG")
        assert "ranks differ in inputs of LlamaForCausalLM.generate" in found["other prompts"]
        assert "save_pretrained: each rank holds only its own part" in found["save"]
        assert "is sharded with DiffusionParallelConfig" in found["config"]


def test_number_of_heads_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path, "qwen3")
    line = (
        "tensor_parallel_size=3 does not fit Qwen3ForCausalLM with num_attention_heads=4 and "
        "num_key_value_heads=2; use 1, 2 or 4"
    )
    with pytest.raises(UnsupportedError, match=line):
        plan_decoder(families.make("qwen3"), 3)
    for call in (lambda: LLM(tmp_path, tensor_parallel_size=3), lambda: shardit.load(tmp_path, tensor_parallel_size=3)):
        with pytest.raises(InputError, match=line):
            call()


@pytest.mark.parametrize(("name", "line"), [("gpt2", "GPT2LMHeadModel"), ("falcon", "Falcon"), ("bloom", "Bloom")])
def test_families_without_rules(name: str, line: str) -> None:
    with pytest.raises(UnsupportedError, match=line):
        plan_decoder(families.make(name), 2)


def test_notes_name_replicated_modules() -> None:
    """They include layers without a rule in a model that has others."""
    with torch.device("meta"):
        model = families.transformers.AutoModelForCausalLM.from_config(families.config_of("qwen3_next"))
    (line,) = lay_out_decoder(model, TWO).notes
    assert "% of the parameters are in model.embed_tokens, model.layers.*.mlp.gate" in line
    assert "linear_attn" not in line
    four = lay_out_decoder(model, FOUR).notes
    assert "% of the parameters are in model.layers.*.linear_attn.in_proj_qkvz, model.embed_tokens" in four[0]
    assert "linear_attn is whole on every rank: 2 key heads cannot be divided among 4 ranks (3 of them)" in four[1]
    with torch.device("meta"):
        model = families.transformers.AutoModelForCausalLM.from_config(families.config_of("diffllama"))
    assert (
        "self_attn is whole on every rank: no rule matches lambda_q1 (4 of them)"
        in lay_out_decoder(model, TWO).notes[1]
    )


def test_numbers_of_heads_that_may_differ_between_layers() -> None:
    config = families.config_of("dots3_note_text")
    assert config.is_heterogeneous
    assert query_heads(config) in (0, 4)
    assert query_heads(families.config_of("llama")) == 4


def test_layers_that_share_keys_are_cut_alike() -> None:
    model = families.make("gemma4_text")
    assert plan_decoder(model, 2).borrowers == [f"model.layers.{number}.self_attn" for number in (2, 3)]
    model.model.layers[3].self_attn.more = torch.nn.Linear(2, 2)  # which no rule knows
    with pytest.raises(
        UnsupportedError, match=r"model\.layers\.3\.self_attn cannot be cut as other layers, which share"
    ):
        plan_decoder(model, 2)


def test_vocabulary_alone_is_not_tensor_parallelism() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4))
    with pytest.raises(UnsupportedError, match="no rule matches the layers of GPT2LMHeadModel"):
        plan_decoder(model, 2)


@pytest.mark.parametrize(("ranks", "queries", "keys"), [(2, (6, 3), (2, 1)), (3, (3, 3, 3), (1, 1, 1))])
def test_nine_heads_on_few_ranks(ranks: int, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    heads = Heads(9, 3, 1, FAMILY.replicates_keys)
    assert heads.fit(ranks)
    assert heads.query_shards(ranks).lengths == queries
    assert heads.key_shards(ranks).lengths == keys


def test_nine_heads_on_four_ranks() -> None:
    heads = Heads(9, 3, 1, FAMILY.replicates_keys)
    assert heads.query_shards(4).lengths == (3, 2, 2, 2)
    assert heads.key_shards(4).ranks == (((0, 1),), ((1, 1),), ((1, 1), (2, 1)), ((2, 1),))
    assert heads.groups(4) == [3, 2, 1, 2]
    assert [ranks for ranks in range(1, 12) if heads.fit(ranks)] == [1, 2, 3, 4, 9]
    assert not Heads(9, 3, 1).fit(4)
