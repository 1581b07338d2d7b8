"""Files of results load in plain diffusers: LoRA files without a word, whole folders."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shardit import InputError, training
from shardit.models import tiny
from shardit.training.diffusion.families.prompts import embedded_with_gradients
from tests.support.ranks import run_ranks
from tests.training.diffusion.folders import NAMES, model_of, recipe_of, stir
from tests.training.diffusion.runs import saved


@contextmanager
def words() -> Iterator[list[str]]:
    """Collect what diffusers, peft and Python warn of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said.extend(str(one.message) for one in caught)
    for logger in loggers:
        logger.removeHandler(handler)


def plain(name: str) -> Any:
    pipe: Any = tiny.load_plain(tiny.resolve(model_of(name)) or model_of(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def keys_of(file: Path) -> set[str]:
    with safe_open(str(file), "pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_file_loads_without_a_word(name: str, tmp_path: Path) -> None:
    made = recipe_of(name, tmp_path, accumulation=24, lora_alpha=6, lora_dropout=0.3, lora_rslora=name == "flux")
    for model in made.models.values():
        stir(model)
    made.save({part: training.stages(model, made.loss) for part, model in made.models.items()}, tmp_path / "out")
    batches = {one.model: one.data for one in made.micro_batches(0, 0, 1)}
    pipe = plain(name)
    assert batches.keys() == made.models.keys()
    for number, (part, trained) in enumerate(made.models.items()):
        model = getattr(pipe, part)
        base = output(made, model, batches[part])
        folder = tmp_path / "out" / part if number else tmp_path / "out"
        with words() as said:
            pipe.load_lora_weights(folder, **({"load_into_transformer_2": True} if number else {}))
        assert said == []
        assert not dropping(model)
        check_keys(folder, model)
        got, expected = output(made, model, batches[part]), output(made, trained, batches[part])
        assert (got - expected).abs().max() < 1e-5
        assert (got - expected).norm() < 1e-6 * expected.norm()
        assert (got - base).norm() > 1e-3 * expected.norm()


def dropping(model: Any) -> list[str]:
    """Return the dropout that a loaded adapter brings; diffusers leaves it in training mode."""
    return [name for name, part in model.named_modules() if "lora_dropout." in name and getattr(part, "p", 0)]


def output(made: Any, model: Any, data: Any) -> torch.Tensor:
    """What a model returns for a micro-batch, as one row."""
    found: list[torch.Tensor] = []

    def keep(_: Any, __: Any, returned: Any) -> None:
        found.extend(one.flatten() for one in returned[0])

    hook = model.register_forward_hook(keep)
    with torch.no_grad():
        made.loss(model.eval(), data)
    hook.remove()
    return torch.cat(found)


def check_keys(folder: Path, model: Any) -> None:
    """Every key is of a parameter of the adapter, and every parameter has a key, under its ordinary name."""
    keys = keys_of(folder / "pytorch_lora_weights.safetensors")
    held = {re.sub(r"\.default_\d+", "", name) for name, _ in model.named_parameters() if "lora_" in name}
    assert {key.partition(".")[2] for key in keys} == held
    assert {key.partition(".")[0] for key in keys} <= {"transformer", "unet"}
    assert not any(word in key for key in keys for word in ("default", "rank", "stage"))


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_a_lora_file_with_text_encoders_loads(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """transformers refuses the peft of this environment for text encoders, for what it does not need here."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    made = recipe_of(name, tmp_path, train_text_encoder=True, lora_alpha=6, lora_dropout=0.3)
    trained: Any = made.models["unet"]
    stir(trained)
    made.save({"unet": training.stages(trained, made.loss)}, tmp_path / "out")
    for encoder in trained.encoder_names:
        getattr(trained, encoder).eval()
    pipe, caption = plain(name), made.micro_batches(0, 0, 1)[0].data["text"]["captions"]
    place = torch.device("cpu")
    family = trained.family
    with torch.no_grad():
        base = embedded_with_gradients(family, pipe, caption, place)
        with words() as said:
            pipe.load_lora_weights(tmp_path / "out")
        got, expected = embedded_with_gradients(family, pipe, caption, place), trained.prompts(caption, place)
    assert said == []
    for key in expected:
        assert (got[key] - expected[key]).norm() < 1e-6 * expected[key].norm(), key
        assert (got[key] - base[key]).norm() > 1e-3 * expected[key].norm(), key
    keys = keys_of(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    encoders = [part for part in ("text_encoder", "text_encoder_2") if getattr(pipe, part, None) is not None]
    held = {
        f"{part}.{re.sub(r'[.]default_[0-9]+', '', key)}"
        for part in ("unet", *encoders)
        for key, _ in getattr(pipe, part).named_parameters()
        if "lora_" in key
    }
    assert {key.replace("text_model.", "") for key in keys} == {key.replace("text_model.", "") for key in held}


def test_the_output_holds_the_lora_and_nothing_else(tmp_path: Path) -> None:
    made = recipe_of("wan2.2-t2v", tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}")
    for _ in range(2):
        made.save({part: training.stages(model, made.loss) for part, model in made.models.items()}, out)
        made = recipe_of("wan2.2-t2v", tmp_path / "run")
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    name = "pytorch_lora_weights.safetensors"
    assert files == {"metrics.jsonl", name, f"transformer_2/{name}"}


def test_a_full_result_is_a_pipeline_folder(tmp_path: Path) -> None:
    made = recipe_of("wan2.2-t2v", tmp_path / "run", full=True, accumulation=8)
    for model in made.models.values():
        for parameter in model.parameters():
            parameter.data.mul_(1.01)
    out = tmp_path / "out"
    made.save({part: training.stages(model, made.loss) for part, model in made.models.items()}, out)
    with words() as said:
        pipe: Any = tiny.load_plain(out)
    assert said == []
    for part, trained in made.models.items():
        loaded = getattr(pipe, part).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in trained.state_dict().items())
        config = json.loads((out / part / "config.json").read_text())
        assert config["_class_name"] == "WanTransformer3DModel"
    base = plain("wan2.2-t2v")
    for part in ("text_encoder", "vae"):
        others = getattr(base, part).state_dict()
        assert all(torch.equal(one, others[name]) for name, one in getattr(pipe, part).state_dict().items())
    assert pipe.config.boundary_ratio == 0.875
    assert not list(out.rglob(".*"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    made = recipe_of("flux", tmp_path / "run")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match="cannot be written"):
        made.save({part: training.stages(model, made.loss) for part, model in made.models.items()}, file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("full", [False, True])
def test_two_stages_write_what_one_rank_writes(full: bool, tmp_path: Path) -> None:
    run_ranks(2, saved, str(tmp_path / "two"), 2, full, timeout=100)
    run_ranks(1, saved, str(tmp_path / "one"), 1, full, timeout=100)
    two, one = (
        {str(path.relative_to(tmp_path / name / "out")): path for path in (tmp_path / name / "out").rglob("*.*")}
        for name in ("two", "one")
    )
    assert two.keys() == one.keys()
    trained = [name for name in one if name.endswith(".safetensors") and not name.startswith(("text", "vae"))]
    assert len(trained) == 2
    for name in trained:
        got, expected = load_file(two[name]), load_file(one[name])
        assert got.keys() == expected.keys()
        assert all((got[key] - expected[key]).norm() <= 2e-6 * expected[key].norm() for key in expected)
