"""Vision-language models with images in the prompt: over stages the bits of one rank, over tensor ranks close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardit
from shardit import DiffusionParallelConfig
from tests.diffusion.test_parallelize import join
from tests.language import vision
from tests.language.cases import alike
from tests.support.ranks import run_ranks

STAGES = DiffusionParallelConfig(pipeline_parallel_size=2)
SLICES = DiffusionParallelConfig(tensor_parallel_size=2)

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "again": {},
    "text alone": {"images": False},
    "padded": {"padding": 3},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}
PROMPT = ("images", "padding")


def compare(family: str, model: Any, close: float = 0.0) -> dict[str, bool]:
    """Return whether a sharded model gives what a plain one gives, by case."""
    found = {}
    for name, case in CASES.items():
        inputs = {key: value for key, value in case.items() if key in PROMPT}
        options = {key: value for key, value in case.items() if key not in PROMPT}
        expected = vision.generate(vision.make(family), vision.prompts(family, **inputs), **options)
        got = vision.generate(model, vision.prompts(family, **inputs), **options)
        found[name] = torch.equal(expected.sequences, got.sequences) and alike(expected.logits, got.logits, close)
    return found


def in_place(rank: int, count: int, method: str, config: DiffusionParallelConfig, close: float) -> Any:
    join(rank, count, method)
    found = {}
    for family in vision.BUILD:
        model = shardit.parallelize(vision.make(family), config)
        found[family] = compare(family, model, close), held_of(model)
    return found


def held_of(model: nn.Module) -> dict[str, int]:
    """Return the parameters that this rank has, of the tower of vision and of the layers of the text."""
    held = {"vision": 0, "text": 0}
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and ("layers." in name or "blocks." in name):
            held["vision" if "vis" in name else "text"] += parameter.numel()
    return held


def from_folder(rank: int, count: int, method: str, folders: dict[str, str]) -> Any:
    join(rank, count, method)
    found = {}
    for family, folder in folders.items():
        model = shardit.load(folder, STAGES)
        model.generation_config.eos_token_id = None
        found[family] = compare(family, model), held_of(model)
    return found


def check_stages(of_ranks: list[Any]) -> None:
    for family in vision.BUILD:
        whole = held_of(vision.make(family))
        parts = [held for _, held in (found[family] for found in of_ranks)]
        for cases, _ in (found[family] for found in of_ranks):
            assert set(cases.values()) == {True}, (family, cases)
        for kind, count in whole.items():
            assert sum(held[kind] for held in parts) == count, (family, kind)
        assert all(0 < held["text"] < whole["text"] for held in parts), family


def test_stages_give_the_bits_of_one_rank() -> None:
    check_stages(run_ranks(2, in_place, STAGES, 0.0))


def test_load_reads_the_layers_of_its_stage(tmp_path: Path) -> None:
    for family in vision.BUILD:
        vision.make(family).save_pretrained(tmp_path / family)
    check_stages(run_ranks(2, from_folder, {family: str(tmp_path / family) for family in vision.BUILD}))


def test_tensor_ranks_are_close() -> None:
    for found in run_ranks(2, in_place, SLICES, 1e-5):
        for family, (cases, held) in found.items():
            assert set(cases.values()) == {True}, (family, cases)
            assert held["text"] < 0.6 * held_of(vision.make(family))["text"], family


def with_another_picture(rank: int, count: int, method: str) -> list[bool]:
    """As the control: the tower of vision of the last rank has other weights."""
    join(rank, count, method)
    model = shardit.parallelize(vision.make("gemma3"), SLICES)
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.mul_(1.5)
    return [compare("gemma3", model, 1e-5)[case] for case in ("greedy", "text alone")]


@pytest.mark.parametrize("rank", [0, 1])
def test_other_weights_of_vision_are_seen(rank: int) -> None:
    assert run_ranks(2, with_another_picture)[rank] == [False, True]
