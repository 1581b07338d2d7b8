"""Measures what a LoRA of tiny/shapes has learned of diagonal directions, in plain diffusers.

    python examples/shapes/judge_lora.py LORA [FILE]

Clips are made for captions that were held out, without the LoRA and with it; a classifier judges both. docs/training.md
has the command that trains the LoRA. FILE gets the numbers as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import classifier
import torch
from make import clips, marked, share

from shardit.models import tiny
from shardit.training.data import shapes

SAMPLES = 96


def main(lora: str, file: str | None = None) -> None:
    """Print the shares of clips that are right, and write them to `file`."""
    torch.set_num_threads(1)
    judge = classifier.trained("diagonal")
    pipe = tiny.load_plain(tiny.resolve("tiny/shapes"))
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {"samples": SAMPLES, "classifier_on_drawn_clips": classifier.accuracy(judge)}
    found["without"] = measured(pipe, judge)
    pipe.load_lora_weights(lora)
    found["with"] = measured(pipe, judge)
    text = json.dumps(found, indent=2)
    print(text)
    if file is not None:
        Path(file).write_text(text + "\n", encoding="utf-8")


def measured(pipe: Any, judge: classifier.Classifier) -> dict[str, float]:
    """Return the shares of clips whose direction, other attributes, and all attributes are right: of the four
    directions that the model knows, and of the four diagonal ones."""
    asked = [shapes.drawing(number, seed=5, kind="diagonal", held_out=True) for number in range(SAMPLES)]
    right = marked(judge.attributes(clips(pipe, asked)), asked)
    diagonal = [one for one, want in zip(right, asked, strict=True) if " " in want.direction]
    straight = [one for one, want in zip(right, asked, strict=True) if " " not in want.direction]
    return {
        "diagonal_direction": share(diagonal, ("direction",)),
        "straight_direction": share(straight, ("direction",)),
        "outline_and_colour": share(right, ("outline", "colour")),
        "all_right": share(right, tuple(judge.choices)),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
