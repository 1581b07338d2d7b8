"""The script that makes tiny/shapes runs from end to end, with few steps."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path

import pytest

from shardit.models.tiny.tokens import build_tokenizer
from shardit.training.data import shapes
from tests.support.paths import ROOT


def test_each_word_of_a_caption_is_a_token() -> None:
    tokenizer = build_tokenizer("shapes")
    for caption in (
        one for kind in shapes.KINDS for out in (False, True) for one in shapes.captions(kind, held_out=out)
    ):
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 1, caption


@pytest.mark.timeout(200)
def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "shapes"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    make = importlib.import_module("make")
    for name, count in {"PROMPT_STEPS": 2, "SAMPLES": 2, "BATCH": 2}.items():
        monkeypatch.setattr(make, name, count)
    monkeypatch.setattr(make, "AUTOENCODER_STEPS", (5, 2))
    monkeypatch.setattr(make.autoencoder, "_CLIPS", 12)
    monkeypatch.setattr(make.classifier, "trained", functools.partial(make.classifier.trained, steps=2, batch=2))
    make.main(tmp_path, "--steps", "2", "--warmup-steps", "1", "--batch-size", "2", "--data", "shapes:moving:4")
    measured = json.loads((tmp_path / "measured.json").read_text("utf-8"))
    assert set(measured["right"]) == {"outline", "colour", "ground", "direction"}
    assert (tmp_path / "shapes.safetensors").stat().st_size < 12e6
    trained = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in trained] == [1, 2]
