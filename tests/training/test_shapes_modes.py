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
SAMPLES = 4
"""Few, and a classifier that has learnt colours alone, as it has to be fast."""


def parts() -> Any:
    """Return the modules of the classifier and of the script."""
    sys.path.insert(0, str(EXAMPLE))
    return [importlib.import_module(name) for name in ("classifier", "judge_modes")]


def on_rank(rank: int, size: int, method: str, names: list[str], judge: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of modes for a few captions. judge: the weights of the classifier."""
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size)
    classifier, modes = parts()
    model = classifier.Classifier()
    model.load_state_dict(judge)
    asked = [shapes.drawing(number, seed=5, held_out=True) for number in range(SAMPLES)]
    clips = {name: modes.made(modes.MODES[name], asked)[0] for name in ("plain", *names)}
    return {name: modes.compared(model.eval(), asked, clips["plain"], one) for name, one in clips.items()}


@pytest.mark.timeout(300)
def test_a_mode_that_does_damage_is_seen() -> None:
    names = ["2 tensor ranks", "weights in float8 e4m3", "FirstBlockCache 10"]
    judge = parts()[0].trained(steps=80, batch=16).state_dict()
    found, other = run_ranks(2, on_rank, names, judge, timeout=280)
    assert found == other
    plain, sliced, rounded, broken = found.values()
    assert plain["pixel_difference"] == plain["judged_otherwise"] == 0
    assert min(plain["right"][name] for name in ("colour", "ground")) >= 0.75
    assert sliced["right"] == plain["right"]
    assert 0 < sliced["pixel_difference"] < 0.01
    assert 0.01 < rounded["pixel_difference"] < 2
    assert rounded["judged_otherwise"] <= 0.25
    assert broken["judged_otherwise"] > 0.5
    assert broken["pixel_difference"] > 20


def test_the_file_has_every_mode() -> None:
    modes = parts()[1]
    found = json.loads((EXAMPLE / "modes.json").read_text("utf-8"))
    assert list(found["modes"]) == list(modes.MODES)
    assert found["samples"] == modes.SAMPLES
    assert found["modes"]["plain"]["all_right"] > 0.9
