"""Changes to a language model before and after `parallelize`: right on several ranks, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.core.comm.mesh import init_mesh
from tests.language import families
from tests.support.ranks import run_ranks

IDS = torch.arange(10, 24).reshape(2, 7)
ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
DROPPING = {"attention_dropout": 0.2, "resid_pdrop": 0.2}


def logits(model: Any, **options: Any) -> torch.Tensor:
    return model(IDS, **options).logits


def encoder_and_decoder() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=128, **sizes)).eval()


def without_head() -> Any:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return transformers.BartModel(transformers.BartConfig(d_model=32, vocab_size=128, **sizes)).eval()


def compiled() -> Any:
    model = families.make("llama")
    model.model.layers[1].compile(backend="eager")
    return model


def placed() -> Any:
    model = families.make("llama")
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


REFUSED_BEFORE = {
    "has an encoder and a decoder, which pipeline_parallel_size=2 does not cut": encoder_and_decoder,
    "BartModel has an encoder and a decoder": without_head,
    r"give merge_and_unload\(\) of it, or the model inside": lambda: get_peft_model(families.make("llama"), ADAPTER),
    "is compiled, but several ranks run it together": compiled,
    "was placed by accelerate": placed,
}


def over(ranks: str, count: int) -> DiffusionParallelConfig:
    return DiffusionParallelConfig(**{ranks: count})


def vocabulary_is_kept(model: Any) -> None:
    for change in (lambda: model.resize_token_embeddings(90), model.tie_weights):
        with pytest.raises(UnsupportedError, match="only its own part of the vocabulary; change it before"):
            change()


def over_stages(rank: int, count: int, method: str) -> None:
    config = over("pipeline_parallel_size", count)
    init_mesh(config, device="cpu", timeout_s=30, rank=rank, init_method=method)
    for says, make in REFUSED_BEFORE.items():
        with pytest.raises(UnsupportedError, match=says):
            shardit.parallelize(make(), config, timeout_s=30)
    model = shardit.parallelize(families.make("phi", **DROPPING), config, timeout_s=30)
    vocabulary_is_kept(model)
    expected = logits(families.make("phi", **DROPPING))
    for call in (logits, lambda one: one.generate(IDS, max_new_tokens=2), lambda one: one.model(IDS)):
        model.train()
        with pytest.raises(UnsupportedError, match=r"in training mode, and .* would drop other values .* \.eval\(\)"):
            call(model)
        assert torch.equal(logits(model.eval()), expected)


def over_tensor_ranks(rank: int, count: int, method: str) -> None:
    config = over("tensor_parallel_size", count)
    init_mesh(config, device="cpu", timeout_s=30, rank=rank, init_method=method)
    plain = families.make("llama")
    expected, model = logits(plain), shardit.parallelize(copy.deepcopy(plain), config, timeout_s=30)
    vocabulary_is_kept(model)
    with pytest.raises(RuntimeError, match="size"):  # as on one rank
        logits(model, position_ids=torch.zeros(3, 4, dtype=torch.long))
    assert not model.shardit_checks.whole
    assert torch.allclose(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not model.shardit_checks.whole
    get_peft_model(model, ADAPTER)  # in place: each rank draws weights for its slices
    with pytest.raises(UnsupportedError, match="an adapter was made on slices, with other weights on each rank"):
        logits(model)


def test_over_stages() -> None:
    run_ranks(2, over_stages)


def test_over_tensor_ranks() -> None:
    run_ranks(2, over_tensor_ranks)
