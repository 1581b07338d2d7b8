"""A LoRA that `shardit train` has written is served by `shardit serve`, and changes pictures as in plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shardit.cli import main
from shardit.models import tiny
from tests.support.real_omni import by_diffusers, same
from tests.support.real_server import pictures, real_server

SEED, PROMPT, STAGES = 3, "a red circle", ("--pipeline-parallel-size", "2")


def of_diffusers(lora: Path, scale: float) -> Any:
    """Return the picture of plain diffusers with the LoRA."""
    pipe: Any = tiny.load_plain(tiny.resolve("tiny/flux") or "")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(lora), adapter_name="trained")
    pipe.set_adapters(["trained"], [scale])
    call = {**tiny.defaults("flux"), "prompt": PROMPT, "generator": torch.Generator("cpu").manual_seed(SEED)}
    return pipe(**call).images


def test_a_trained_lora_is_served_over_stages(tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    base = ["--model", "tiny/flux", "--data", "shapes:still:4", "--output", str(lora)]
    flags = ["--resolution", "32x32", "--steps", "3", "--learning-rate", "3e-2", "--lora-rank", "4"]
    assert main(["train", *base, *flags, *STAGES]) == 0
    loaded = ("--lora", f"{lora}:0.5", "--log-format", "json")
    with real_server("flux", tmp_path / "data", *STAGES, *loaded) as server:
        job = server.submit(SEED, PROMPT)
        shown = server.ended(job)
        assert shown["status"] == "completed", shown
        made = pictures(server.result(job))
        assert server.stop() == 0
    assert same(of_diffusers(lora, 0.5), made)
    assert not same(of_diffusers(lora, 1.0), made)  # controls: the scale counts, and the LoRA
    assert not same(by_diffusers("flux", SEED, prompt=PROMPT), made)
