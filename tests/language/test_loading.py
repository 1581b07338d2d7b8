"""Language models are loaded layer by layer: each rank reads its own, and generates the tokens of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shardit
from shardit import DiffusionParallelConfig, InputError, UnsupportedError
from shardit.core.comm.mesh import init_mesh
from tests.language import families
from tests.language.cases import CASES, compare
from tests.support.ranks import run_ranks


def write(folder: Path, name: str, tied: bool, head: bool, **options: Any) -> None:
    """Write a folder with a model; tied: embedding and head are one tensor; head: the file also has it under the head's
    name."""
    config = families.config_of(name)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    model.save_pretrained(folder, **options)
    file = folder / "model.safetensors"
    if tied and head:
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, file, {"format": "pt"})


def loaded(
    rank: int, count: int, method: str, folder: str, axis: str = "pipeline_parallel_size"
) -> tuple[str, int, int, list[str]]:
    config = DiffusionParallelConfig(**{axis: count})
    init_mesh(config, device="cpu", timeout_s=30, rank=rank, init_method=method)
    model = shardit.load(folder, config, device="cpu", timeout_s=30)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    held = {id(p): p for p in model.parameters() if not p.is_meta}
    wide = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.is_meta and 128 in p.shape]
    how = compare(plain, model, CASES[0], 1e-5 if axis == "tensor_parallel_size" else 0.0)
    return how, sum(p.numel() for p in held.values()), families.parameters(plain), wide


@pytest.mark.parametrize(
    ("name", "tied", "head"), [("llama", True, False), ("qwen3", True, True), ("qwen3", False, False)]
)
def test_each_rank_reads_its_layers(tmp_path: Path, name: str, tied: bool, head: bool) -> None:
    write(tmp_path, name, tied, head)
    count = 2 if name == "llama" else 3
    for rank, (how, held, whole, wide) in enumerate(run_ranks(count, loaded, str(tmp_path))):
        assert how == "right"
        assert held < 0.75 * whole
        expected = {0: ["model.embed_tokens.weight"], count - 1: ["lm_head.weight"]}.get(rank, [])
        assert wide == (["model.embed_tokens.weight", "lm_head.weight"] if tied and expected else expected)


def test_sharded_files(tmp_path: Path) -> None:
    write(tmp_path, "llama", False, False, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert [how for how, *_ in run_ranks(2, loaded, str(tmp_path))] == ["right", "right"]


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("mamba2", False)])
def test_each_tensor_rank_reads_its_slices(tmp_path: Path, name: str, tied: bool) -> None:
    write(tmp_path, name, tied, False)
    for how, held, whole, _ in run_ranks(2, loaded, str(tmp_path), "tensor_parallel_size"):
        assert how == "right"
        assert held < 0.58 * whole


def test_options_of_pipelines_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "llama", False, False)
    with pytest.raises(InputError, match=r"scheduler: .* holds a language model, which takes none"):
        shardit.load(tmp_path, scheduler="EulerDiscreteScheduler")
    with pytest.raises(UnsupportedError, match="ulysses_degree=2: a language model runs over"):
        shardit.load(tmp_path, ulysses_degree=2)
    with pytest.raises(InputError, match=r"pipeline_class: .* holds a language model"):
        shardit.load(tmp_path, pipeline_class="FluxPipeline")


def test_one_rank(tmp_path: Path) -> None:
    write(tmp_path, "llama", False, False)
    assert compare(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), shardit.load(tmp_path), CASES[0]) == "right"


def generated(rank: int, count: int, method: str, folder: str, axis: str) -> list[int]:
    config = DiffusionParallelConfig(**{axis: count})
    init_mesh(config, device="cpu", timeout_s=30, rank=rank, init_method=method)
    ids = torch.arange(10, 24).reshape(2, 7)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    return shardit.load(folder, config, device="cpu", timeout_s=30).generate(ids, **options).flatten().tolist()


@pytest.mark.parametrize("axis", ["pipeline_parallel_size", "tensor_parallel_size"])
def test_head_of_its_own_in_a_tied_configuration(tmp_path: Path, axis: str) -> None:
    """transformers does not tie weights of which the file has two that differ."""
    write(tmp_path, "llama", True, True)
    tied = generated(0, 1, "", str(tmp_path), "pipeline_parallel_size")
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.randn(128, 32)}, file, {"format": "pt"})
    expected = generated(0, 1, "", str(tmp_path), "pipeline_parallel_size")
    assert expected != tied
    assert run_ranks(2, generated, str(tmp_path), axis) == [expected, expected]
