"""LoRA adapters of language models: the weights are those that peft merges, and each rank has its own of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import shardit
from shardit import DiffusionParallelConfig, InputError
from shardit.core.comm.mesh import init_mesh
from shardit.language.loading.adapter import adapted_tokenizer
from shardit.language.loading.source import decoder_source
from shardit.settings.model_options import model_options
from tests.language import families
from tests.language.adapters import ALL, change_config, change_weights, plain_peft, write_adapter
from tests.language.cases import CASES, compare
from tests.language.folders import TEMPLATE
from tests.language.folders import write as write_folder
from tests.language.test_loading import write
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write(folder, "llama", False, False)
    return folder


def differing(model: Any, other: Any) -> list[str]:
    """Return the names of the tensors that differ in their bits."""
    first, second = model.state_dict(), other.state_dict()
    assert set(first) == set(second)
    return [name for name in first if first[name].dtype != second[name].dtype or not first[name].equal(second[name])]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"down_proj": 3, r".*\.2\.self_attn\.v_proj": 5},
    },
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "few layers": {"layers_to_transform": [1, 3]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_the_weights_are_those_that_peft_merges(base: Path, tmp_path: Path, kind: str, scale: float) -> None:
    adapter = write_adapter(tmp_path / "a", base, **KINDS[kind])
    merged = plain_peft(base, (adapter, scale))
    assert differing(shardit.load(base, lora=(adapter, scale)), merged) == []
    assert differing(shardit.load(base), merged) != []  # control: the adapter changes weights


def test_several_adapters(base: Path, tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a", base)
    second = write_adapter(tmp_path / "b", base, seed=2, r=3, target_modules=["q_proj", "lm_head"])
    merged = plain_peft(base, (first, 0.5), (second, 2.0))
    assert differing(shardit.load(base, lora=[f"{first}:0.5", (second, 2)]), merged) == []
    assert differing(shardit.load(base, lora=[(first, 0.5)]), merged) != []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_weights(base: Path, tmp_path: Path, dtype: str) -> None:
    """The product is added in float32 and rounded once, as peft does it."""
    adapter = write_adapter(tmp_path / "a", base)
    merged = plain_peft(base, (adapter, 0.7), dtype=getattr(torch, dtype))
    made = shardit.load(base, dtype=dtype, lora=(adapter, 0.7))
    assert next(made.parameters()).dtype == getattr(torch, dtype)
    assert differing(made, merged) == []


def test_linears_of_a_transposed_class(tmp_path: Path) -> None:
    write(tmp_path / "gpt2", "gpt2", False, False)
    adapter = write_adapter(tmp_path / "a", tmp_path / "gpt2", target_modules=["c_attn", "c_proj", "wte"])
    merged = plain_peft(tmp_path / "gpt2", (adapter, 1.0))
    assert differing(shardit.load(tmp_path / "gpt2", lora=adapter), merged) == []


def loaded(
    rank: int, size: int, method: str, folder: str, loras: list[tuple[str, float]], axes: dict[str, Any], close: float
) -> tuple[str, str, int]:
    """Compare with the model that peft merges, and with the model without adapters; return the parameters held, too."""
    config = DiffusionParallelConfig(**axes)
    init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method)
    model = shardit.load(folder, config, device="cpu", lora=loras, timeout_s=60)
    merged = plain_peft(Path(folder), *((Path(path), scale) for path, scale in loras))
    held = {id(p): p for p in model.parameters() if not p.is_meta}
    return (
        compare(merged, model, CASES[0], close),
        compare(plain_peft(Path(folder)), model, CASES[0], close),
        sum(one.numel() for one in held.values()),
    )


@pytest.mark.parametrize(
    ("name", "axes", "close"),
    [
        ("llama", {"pipeline_parallel_size": 2}, 0.0),
        ("llama", {"pipeline_parallel_size": 3}, 0.0),
        ("llama", {"tensor_parallel_size": 2}, 1e-5),
        ("llama", {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, 1e-5),
        ("mixtral", {"pipeline_parallel_size": 2}, 0.0),
        ("mixtral", {"tensor_parallel_size": 2}, 1e-5),
    ],
)
def test_over_ranks(tmp_path: Path, name: str, axes: dict[str, Any], close: float) -> None:
    """Over stages the bits are those of one rank. Files of Mixtral have other tensors than the model, which are merged
    before the adapter is."""
    folder = tmp_path / name
    write(folder, name, False, False)
    targets = [*ALL[:4], "lm_head", "embed_tokens"]
    first = write_adapter(tmp_path / "a", folder, target_modules=targets, modules_to_save=["input_layernorm"])
    second = write_adapter(tmp_path / "b", folder, seed=2, target_modules=["v_proj", "o_proj"])
    size = axes.get("pipeline_parallel_size", 1) * axes.get("tensor_parallel_size", 1)
    loras = [(str(first), 1.0), (str(second), 0.5)]
    whole = families.parameters(families.make(name))
    for merged, plain, held in run_ranks(size, loaded, str(folder), loras, axes, close):
        assert merged == "right"
        assert plain == "WRONG"  # control
        assert held < 0.75 * whole


def logits(rank: int, size: int, method: str, folder: str, adapter: str, axes: dict[str, Any]) -> torch.Tensor:
    if size > 1:
        config = DiffusionParallelConfig(**axes)
        init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method)
    model = shardit.load(folder, device="cpu", lora=adapter, timeout_s=60, **axes)
    ids = torch.arange(10, 24).reshape(2, 7)
    made = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return torch.stack(made.logits)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_weights_are_changed_where_the_adapter_is(tmp_path: Path, target: str) -> None:
    """Training changes the embedding or the head alone; `merge_and_unload` of peft would change both."""
    folder = tmp_path / "tied"
    write(folder, "llama", True, False)
    adapter = write_adapter(tmp_path / "a", folder, target_modules=[target])
    one = logits(0, 1, "", str(folder), str(adapter), {})
    ids = torch.arange(10, 24).reshape(2, 7)
    with torch.no_grad():
        trained = plain_peft(folder, (adapter, 1.0), merged=False)(ids).logits[:, -1]
        merged = plain_peft(folder, (adapter, 1.0))(ids).logits[:, -1]
    assert torch.allclose(one[0], trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one[0], merged, rtol=1e-2, atol=1e-3)  # control
    for made in run_ranks(2, logits, str(folder), str(adapter), {"pipeline_parallel_size": 2}):
        assert torch.equal(made, one)
    for made in run_ranks(2, logits, str(folder), str(adapter), {"tensor_parallel_size": 2}):
        assert torch.allclose(made, one, rtol=1e-4, atol=1e-5)


def test_the_chat_template_is_that_of_the_last_adapter_with_one(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base")
    adapters = [write_adapter(tmp_path / name, base) for name in "abc"]
    (adapters[0] / "chat_template.jinja").write_text("first")
    (adapters[1] / "tokenizer_config.json").write_text('{"chat_template": "second"}')
    (adapters[2] / "tokenizer_config.json").write_text("{}")

    def template(*chosen: Path) -> str:
        return adapted_tokenizer(decoder_source(base), model_options(lora=list(chosen)).lora).chat_template

    assert template(adapters[0]) == "first"
    assert template(*adapters) == "second"
    assert template(adapters[2]) == template() == TEMPLATE


REFUSED: dict[str, tuple[str, Any]] = {
    "DoRA": ("use_dora=True, which is not supported: merge it", {"use_dora": True}),
    "parameters": ("target_parameters=", {"target_parameters": ["mlp.experts.down_proj"]}),
    "bias of matrices": ("lora_bias=True", {"lora_bias": True}),
    "tokens": ("trainable_token_indices=", {"trainable_token_indices": [3]}),
    "a field of later versions": ("use_wonder=4", {"use_wonder": 4}),
    "start": ("init_lora_weights=pissa, which changes the weights of the base", {"init_lora_weights": "pissa"}),
    "kind": ("is a LOHA adapter", {"peft_type": "LOHA"}),
    "rank": ("needs matrices of [5, 64] and [32, 5], the file has [4, 64] and [32, 4]", {"r": 5}),
    "no alpha": ("has no lora_alpha", {"lora_alpha": None}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_are_refused_by_name(base: Path, tmp_path: Path, kind: str) -> None:
    text, values = REFUSED[kind]
    adapter = change_config(write_adapter(tmp_path / "a", base), **values)
    with pytest.raises(InputError, match=re.escape(text)) as error:
        shardit.load(base, lora=adapter)
    assert str(adapter) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", base)

    def refused(text: str, lora: Any, model: Path = base) -> None:
        with pytest.raises(InputError, match=re.escape(text)) as error:
            shardit.load(model, lora=lora)
        assert str(tmp_path) in str(error.value)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    write(tmp_path / "gpt2", "gpt2", False, False)
    refused("it was trained on", good, tmp_path / "gpt2")
    unnamed = change_config(copy("unnamed"), base_model_name_or_path=None)
    refused("does not fit GPT2LMHeadModel: the file has weights for model.layers.0", unnamed, tmp_path / "gpt2")
    shape = {"layers__1__mlp__up_proj__lora_A__weight": torch.zeros(4, 16)}
    refused("model.layers.1.mlp.up_proj needs matrices of [4, 32] and [64, 4]", change_weights(copy("shape"), **shape))
    half = {"layers__1__mlp__up_proj__lora_A__weight": None}
    refused("has one matrix of two for model.layers.1.mlp.up_proj", change_weights(copy("half"), **half))
    (empty := copy("no config") / "adapter_config.json").unlink()
    refused("has no adapter_config.json, which adapters of language models have", empty.parent)
    (damaged := copy("damaged") / "adapter_config.json").write_text("{")
    refused("is damaged", damaged.parent)
    (short := copy("short") / "adapter_model.safetensors").write_bytes(b"12345678901234567890")
    refused("adapter_model.safetensors", short.parent)
    (renamed := copy("renamed") / "adapter_model.safetensors").rename(tmp_path / "renamed" / "other.safetensors")
    refused("has no adapter_model.safetensors", renamed.parent)
    refused("load_into_transformer_2 is for pipelines", f"transformer_2={good}")
    whole = write_adapter(tmp_path / "whole", base, modules_to_save=["lm_head"])
    twice = Path(shutil.copytree(whole, tmp_path / "twice"))
    refused("both replace lm_head.weight", [whole, twice])
    grown = {"model__lm_head__weight": torch.zeros(130, 32)}
    refused("the file has base_model.model.lm_head.weight of shape [130, 32]", change_weights(whole, **grown))
