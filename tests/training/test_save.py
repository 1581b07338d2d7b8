"""What is saved from two stages: ordinary folders and LoRA files, the same as those of one rank."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardit import InputError, training
from tests.support.ranks import run_ranks
from tests.training.cases import lora, wan
from tests.training.models import accumulate, task
from tests.training.runs import join


def adapted(model: Any, name: str) -> Any:
    """The model with an adapter: of diffusers in place, around a language model by peft."""
    if name != "llama":
        lora(model)
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def trained(
    rank: int, size: int, method: str, name: str, folder: str, adapter: bool, steps: int, **axes: int
) -> list[float]:
    """Train over stages, or the given axes, with AdamW and save; return the norms before clipping."""
    join(rank, size, method)
    chosen = task(name)
    model: Any = chosen.build()
    if adapter:
        model = adapted(model, name)
    staged = training.stages(model, chosen.loss, timeout_s=30, **(axes or {"pipeline_parallel_size": size}))
    optimizer = torch.optim.AdamW([p for p in staged.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for step in range(steps):
        staged.step([chosen.batch(step * 3 + number, False) for number in range(3)])
        found.append(float(staged.clip_grad_norm_(0.5)))
        optimizer.step()
        optimizer.zero_grad()
    staged.save_pretrained(folder)
    if rank == 0:
        Path(folder, "notes.txt").write_text("mine")
        Path(folder, "tokenizer").mkdir()
        Path(folder, "model-00001-of-00002.safetensors").write_text("weights of an earlier save")
    staged.save_pretrained(folder)  # over the first
    with pytest.raises(InputError, match="cannot be written"):
        staged.save_pretrained(next(Path(folder).glob("*.safetensors")))
    staged.step([chosen.batch(0, False)])  # saving leaves the stages as they are
    return found


def plainly(name: str, adapter: bool, steps: int) -> tuple[Any, list[float]]:
    """The same on one rank."""
    chosen = task(name)
    model: Any = chosen.build()
    if adapter:
        model = adapted(model, name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    norms = []
    for step in range(steps):
        accumulate(model, chosen.loss, [chosen.batch(step * 3 + number, False) for number in range(3)])
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


TENSOR = functools.partial(trained, tensor_parallel_size=2)
BOTH = functools.partial(TENSOR, pipeline_parallel_size=2)


def close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 2e-6) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= bound * tensor.norm() + 1e-7, name


def test_a_lora_of_two_stages_is_that_of_one_rank_and_loads_in_plain_diffusers(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    of_ranks = run_ranks(2, trained, "WanTransformer3DModel", str(folder), True, 2, timeout=100)
    plain, norms = plainly("WanTransformer3DModel", True, 2)
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0] == pytest.approx(norms, rel=2e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "tokenizer", "pytorch_lora_weights.safetensors"}
    plain.save_lora_adapter(tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "pytorch_lora_weights.safetensors")
    close(
        load_file(folder / "pytorch_lora_weights.safetensors"),
        {f"transformer.{name}": tensor for name, tensor in expected.items()},
    )
    _loads_in_a_pipeline(folder, plain)


def _loads_in_a_pipeline(folder: Path, trained_model: Any) -> None:
    from diffusers import WanPipeline

    fresh = wan().build()
    pipe: Any = WanPipeline(None, None, None, None, transformer=fresh)  # pyright: ignore
    pipe.load_lora_weights(folder)
    batch = wan().batch(9, False)
    with torch.no_grad():
        got, expected, base = (m(**batch).sample for m in (fresh, trained_model, wan().build()))
    assert (got - expected).abs().max() < 1e-5
    assert (got - base).abs().max() > 1e-3


def test_a_diffusers_model_of_two_stages_loads_whole(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    folder = tmp_path / "made" / "model"
    run_ranks(2, trained, "WanTransformer3DModel", str(folder), False, 2, timeout=100)
    loaded: Any = WanTransformer3DModel.from_pretrained(folder)
    plain, _ = plainly("WanTransformer3DModel", False, 2)
    close(loaded.state_dict(), plain.state_dict())
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"


def test_a_language_model_of_two_stages_loads_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    run_ranks(2, trained, "llama", str(folder), False, 2, timeout=100)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    plain, _ = plainly("llama", False, 2)
    close(loaded.state_dict(), plain.state_dict())


def test_an_adapter_of_a_language_model_loads_in_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    folder = tmp_path / "adapter"
    run_ranks(2, trained, "llama", str(folder), True, 2, timeout=100)
    plain, _ = plainly("llama", True, 2)
    plain.save_pretrained(tmp_path / "plain")
    file = "adapter_model.safetensors"
    close(load_file(folder / file), load_file(tmp_path / "plain" / file))
    loaded: Any = PeftModel.from_pretrained(task("llama").build(), str(folder))  # pyright: ignore
    ids = task("llama").batch(5, False)
    with torch.no_grad():
        assert (loaded(ids).logits - plain(ids).logits).abs().max() < 1e-5
        assert (loaded(ids).logits - task("llama").build()(ids).logits).abs().max() > 1e-3  # pyright: ignore


@pytest.mark.parametrize(("size", "train"), [(2, TENSOR), (4, BOTH)])
def test_slices_are_saved_whole(size: int, train: Any, tmp_path: Path) -> None:
    """A language model, an adapter of one with its norms, and a LoRA of diffusers."""
    from transformers import AutoModelForCausalLM

    of_ranks = run_ranks(size, train, "llama", str(tmp_path / "model"), False, 2, timeout=100)
    plain, norms = plainly("llama", False, 2)
    assert all(found == of_ranks[0] == pytest.approx(norms, rel=5e-5) for found in of_ranks)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    close(loaded.state_dict(), plain.state_dict(), 2e-4)
    of_ranks = run_ranks(size, train, "llama", str(tmp_path / "adapter"), True, 2, timeout=100)
    plain, norms = plainly("llama", True, 2)
    assert all(found == of_ranks[0] == pytest.approx(norms, rel=5e-5) for found in of_ranks)
    plain.save_pretrained(tmp_path / "plain")
    file = "adapter_model.safetensors"
    close(load_file(tmp_path / "adapter" / file), load_file(tmp_path / "plain" / file), 2e-4)
    run_ranks(size, train, "WanTransformer3DModel", str(tmp_path / "lora"), True, 1, timeout=100)
    plain, _ = plainly("WanTransformer3DModel", True, 1)
    plain.save_lora_adapter(tmp_path / "plain-lora")
    file = "pytorch_lora_weights.safetensors"
    expected = {f"transformer.{name}": one for name, one in load_file(tmp_path / "plain-lora" / file).items()}
    close(load_file(tmp_path / "lora" / file), expected, 2e-4)


def test_a_folder_is_replaced_without_a_moment_in_which_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = training.stages(torch.nn.Linear(2, 2), lambda model, batch: model(batch).sum())
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last").write_text("mine")
    (tmp_path / ".run.partial-1").mkdir()  # of a process that was killed
    with monkeypatch.context() as patch:
        if sys.platform == "linux":
            patch.setattr(Path, "rename", lambda *_: pytest.fail("two names are changed, one after the other"))
        staged.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "model.safetensors"]
    assert (folder / "checkpoints" / "last").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.setattr("shardit.training.save._exchange", lambda *_: False)
    staged.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
