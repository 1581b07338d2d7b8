"""Weights that transformers computes from several tensors of the files: a rank reads those of its layers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardit import InputError
from shardit.core.placement.slices import Slice
from shardit.language.loading.prepared import PreparedDecoder
from shardit.language.loading.source import DecoderSource
from shardit.loading.safetensors_file import Reads
from tests.language import families
from tests.language.test_loading import loaded
from tests.support.ranks import run_ranks

EXPERTS = 12
"""More than ten: their order is that of numbers, not of texts."""

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "jamba")


def write(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS)
    own = families.config_of(name).to_dict()
    model = families.make(name, **{key: value for key, value in counts.items() if key in own}).to(dtype)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    model.save_pretrained(folder)


def of_first_layers(name: str) -> bool:
    return not any(f".layers.{number}." in name for number in (2, 3))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_owned_tensors_are_those_of_from_pretrained(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    write(tmp_path, name, dtype)
    files = load_file(tmp_path / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert plain.keys() != files.keys()  # the case of this test
    prepared, reads = PreparedDecoder(DecoderSource(tmp_path), "float32"), Reads()
    found = prepared.load_owned(of_first_layers, "cpu", reads).state_dict()
    assert found.keys() == plain.keys()
    for key, tensor in found.items():
        assert tensor.is_meta != of_first_layers(key), key
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (
            plain[key].dtype,
            plain[key].shape,
            plain[key].stride(),
        )
        assert tensor.is_meta or torch.equal(tensor, plain[key]), key
    assert reads.bytes == sum(one.nbytes for key, one in files.items() if of_first_layers(key))


def test_slices_of_experts(tmp_path: Path) -> None:
    write(tmp_path, "mixtral")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    parts = {"gate_up_proj": Slice(1, ((0, 8), (64, 8))), "down_proj": Slice(2, ((8, 16),))}

    def owned(name: str) -> bool | Slice:
        return parts.get(name.rpartition(".")[2], True)

    found = PreparedDecoder(DecoderSource(tmp_path)).load_owned(owned, "cpu").state_dict()
    for key, tensor in found.items():
        part = owned(key)
        expected = part.take(plain[key]) if isinstance(part, Slice) else plain[key]
        assert torch.equal(tensor, expected), key
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() - tensor.nbytes < 64, key


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "mixtral")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    missing = next(name for name in tensors if ".layers.1." in name and ".experts.3." in name)
    save_file({name: one for name, one in tensors.items() if name != missing}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"the tensors of model.layers.1.*do not give what MixtralForCausalLM needs"):
        PreparedDecoder(DecoderSource(tmp_path)).load_owned(of_first_layers, "cpu")


@pytest.mark.parametrize("axis", ["pipeline_parallel_size", "tensor_parallel_size"])
def test_ranks_generate_the_tokens_of_one(tmp_path: Path, axis: str) -> None:
    write(tmp_path, "mixtral")
    for how, held, whole, _ in run_ranks(2, loaded, str(tmp_path), axis):
        assert how == "right"
        assert held < 0.6 * whole
