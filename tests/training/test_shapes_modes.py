"""Lossy and rounding modes of tiny/shapes are judged by a classifier: few clips, some modes, one that does damage."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest
import torch.distributed as dist

from shardit.training.data import shapes
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks

EXAMPLE = ROOT / "examples" / "shapes"
SAMPLES = 8


def judged(names: list[str]) -> dict[str, Any]:
    """Return the numbers of modes for a few captions."""
    sys.path.insert(0, str(EXAMPLE))
    classifier, modes = (importlib.import_module(name) for name in ("classifier", "judge_modes"))
    judge = classifier.trained(steps=200)
    asked = [shapes.drawing(number, seed=5, held_out=True) for number in range(SAMPLES)]
    plain, _ = modes.made(modes.MODES["plain"], asked)
    return {name: modes.compared(judge, asked, plain, modes.made(modes.MODES[name], asked)[0]) for name in names}


def on_rank(rank: int, size: int, method: str, names: list[str]) -> dict[str, Any]:
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size)
    return judged(names)


@pytest.mark.timeout(200)
def test_a_mode_that_does_damage_is_seen() -> None:
    names = ["plain", "2 tensor ranks", "weights in float8 e4m3", "FirstBlockCache 10"]
    found, other = run_ranks(2, on_rank, names, timeout=180)
    assert found == other
    assert found["plain"]["pixel_difference"] == found["plain"]["judged_otherwise"] == 0
    assert found["plain"]["all_right"] >= 0.75
    assert found["2 tensor ranks"]["all_right"] == found["plain"]["all_right"]
    assert 0 < found["2 tensor ranks"]["pixel_difference"] < 0.01
    assert 0.01 < found["weights in float8 e4m3"]["pixel_difference"] < 10
    assert found["FirstBlockCache 10"]["all_right"] < 0.5


def test_the_file_has_every_mode() -> None:
    sys.path.insert(0, str(EXAMPLE))
    modes = importlib.import_module("judge_modes")
    found = json.loads((EXAMPLE / "modes.json").read_text("utf-8"))
    assert list(found["modes"]) == list(modes.MODES)
    assert found["samples"] == modes.SAMPLES
    assert found["modes"]["plain"]["all_right"] > 0.9
