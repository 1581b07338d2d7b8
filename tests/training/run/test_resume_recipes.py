"""Runs of real recipes that go on end in the same bits: a LoRA of a diffusers pipeline, a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from shardit.config import DiffusionParallelConfig
from shardit.training.run.checkpoint import find
from shardit.training.run.launch import LocalRun
from shardit.training.run.messages import SESSION, TrainSpec
from shardit.training.run.options.check import DIFFUSION, LANGUAGE
from shardit.training.settings import TrainSettings
from tests.training.run.runs import rows, same

LORA: dict[str, Any] = {
    "model": "tiny/flux",
    "resolution": "64",
    "batch_size": 2,
    "accumulation": 2,
    "lora_rank": 4,
    "lora_dropout": 0.2,
    "caption_dropout": 0.4,
    "learning_rate": 1e-2,
    "ema_decay": 0.9,
}
TEXTS: dict[str, Any] = {
    "model": "tiny/llama",
    "full": True,
    "batch_size": 2,
    "accumulation": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
}


pytestmark = pytest.mark.usefixtures("one_fork_server")


def images(folder: Path) -> str:
    """Images of two sizes, so of two buckets, with captions."""
    folder.mkdir()
    for number in range(7):
        size = (64, 64) if number % 2 else (96, 48)
        Image.new("RGB", size, (30 * number, 80, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image number {number}")
    return str(folder)


def texts(folder: Path) -> str:
    """Texts of several lengths."""
    folder.mkdir()
    lines = [json.dumps({"text": "the cat sat on the mat " * (1 + number % 3)}) for number in range(7)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def run(recipe: str, output: Path, config: DiffusionParallelConfig, **given: Any) -> None:
    settings = TrainSettings(output=output, timeout_s=60.0, save_every=2, **given)
    assert not LocalRun(
        TrainSpec(settings.model, config, timeout_s=60.0, session=SESSION, settings=settings, recipe=recipe)
    ).run()


@pytest.mark.parametrize(
    ("recipe", "settings", "stages", "results"),
    [
        (DIFFUSION, LORA, 1, ("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors")),
        (DIFFUSION, LORA, 2, ("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors")),
        (LANGUAGE, TEXTS, 1, ("model.safetensors",)),
    ],
)
def test_three_steps_and_four_are_seven(
    recipe: str, settings: dict[str, Any], stages: int, results: tuple[str, ...], tmp_path: Path
) -> None:
    """The second half meets other epochs, buckets and dropped captions than the first."""
    data = images(tmp_path / "data") if recipe == DIFFUSION else texts(tmp_path / "data")
    config = DiffusionParallelConfig(pipeline_parallel_size=stages)
    run(recipe, tmp_path / "whole", config, data=data, steps=7, **settings)
    run(recipe, tmp_path / "torn", config, data=data, steps=3, **settings)
    assert [one.step for one in find(tmp_path / "torn")] == [3, 2]
    run(recipe, tmp_path / "torn", config, data=data, steps=7, resume=True, **settings)
    assert rows(tmp_path / "torn") == rows(tmp_path / "whole")
    assert len({tuple(row["items"]) for row in rows(tmp_path / "whole")}) > 3
    for name in results:
        assert same(load_file(tmp_path / "torn" / name), load_file(tmp_path / "whole" / name)), name
