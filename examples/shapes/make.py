"""Makes tiny/shapes from nothing: an autoencoder, a video model trained by `shardit train`, and a measurement of it.

    python examples/shapes/make.py FOLDER

Steps whose result is in the folder are skipped, so that a second run goes on where the first one ended. More arguments
go to `shardit train`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import autoencoder
import classifier
import model
import numpy as np
import prompts
import torch
from safetensors.torch import load_file, save_file

from shardit.models import tiny
from shardit.models.tiny.tokens import build_tokenizer
from shardit.training.data import shapes

HERE = Path(__file__).parent
TRAINED = ("vae", "text_encoder", "transformer")
AUTOENCODER_STEPS = 3000, 600
PROMPT_STEPS = 500
SAMPLES, BATCH = 200, 8


def main(folder: Path, *more: str) -> None:
    """Make everything in `folder`, and print what was measured. more: flags of `shardit train`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start, run, packed = folder / "start", folder / "run", folder / "shapes.safetensors"
    if not (vae := folder / "autoencoder.safetensors").exists():
        made = autoencoder.trained(*AUTOENCODER_STEPS, Progress("autoencoder: mean absolute error"))
        save_file(made.state_dict(), str(vae))
    if not (text_encoder := folder / "text_encoder.safetensors").exists():
        made = model.built("text_encoder")
        prompts.train(made, build_tokenizer("shapes"), PROMPT_STEPS, Progress("text encoder: loss"))
        save_file({name: tensor.clone() for name, tensor in made.state_dict().items()}, str(text_encoder))
    if not start.exists():
        states = {"vae": load_file(vae), "text_encoder": load_file(text_encoder)}
        states["transformer"] = model.built("transformer").state_dict()
        model.join(states, start.with_suffix(".safetensors"), torch.float32)
        model.write(start.with_suffix(".safetensors"), start)
    if not packed.exists():
        command = [sys.executable, "-m", "shardit", "train", "--config", str(HERE / "train.toml")]
        resume = ["--resume"] if run.exists() else []
        subprocess.run([*command, "--model", str(start), "--output", str(run), *resume, *more], check=True)
        pipe = tiny.load_plain(run)
        model.join({name: getattr(pipe, name).state_dict() for name in TRAINED}, packed, torch.bfloat16)
    measured = measure(packed)
    (folder / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=2))


def measure(weights: Path) -> dict[str, Any]:
    """Return the shares of clips, made for captions that were held out, that a classifier finds right."""
    judge = classifier.trained()
    folder = weights.with_name("measured")
    if not folder.exists():
        model.write(weights, folder)
    pipe = tiny.load_plain(folder)
    pipe.set_progress_bar_config(disable=True)
    asked = [shapes.drawing(number, seed=5, held_out=True) for number in range(SAMPLES)]
    begin = time.perf_counter()
    right = marked(judge.attributes(clips(pipe, asked)), asked)
    return {
        "samples": SAMPLES,
        "classifier_on_drawn_clips": classifier.accuracy(judge),
        "right": {name: sum(one[name] for one in right) / SAMPLES for name in classifier.CHOICES},
        "colour_outline_and_direction_right": share(right, ("outline", "colour", "direction")),
        "all_right": share(right, tuple(classifier.CHOICES)),
        "seconds_per_sample": round((time.perf_counter() - begin) / SAMPLES, 2),
    }


def clips(pipe: Any, asked: Sequence[shapes.Drawing]) -> torch.Tensor:
    """Make a clip for each caption, in batches; return them as (N, 3, frames, height, width) in [-1, 1]."""
    made = []
    for first in range(0, len(asked), BATCH):
        prompts = [one.caption for one in asked[first : first + BATCH]]
        generators = [torch.Generator().manual_seed(number) for number, _ in enumerate(prompts)]
        frames = pipe(prompt=prompts, generator=generators, output_type="np", **model.RECIPE.call).frames
        made.append(torch.from_numpy(np.asarray(frames)).permute(0, 4, 1, 2, 3).float() * 2 - 1)
    return torch.cat(made)


def marked(found: Sequence[dict[str, str]], asked: Sequence[shapes.Drawing]) -> list[dict[str, bool]]:
    """Return for each clip which of its attributes are those of the caption."""
    return [{name: one[name] == getattr(want, name) for name in one} for one, want in zip(found, asked, strict=True)]


def share(right: Sequence[dict[str, bool]], names: Sequence[str]) -> float:
    """Return the share of clips with all of these attributes right."""
    return sum(all(one[name] for name in names) for one in right) / len(right)


class Progress:
    """Prints a line now and then."""

    def __init__(self, text: str, every: int = 100):
        self.text, self.every, self.values, self.begin = text, every, [0.0], time.perf_counter()
        self.values.clear()

    def __call__(self, step: int, value: float) -> None:
        """Note the value of a step."""
        self.values.append(value)
        if step % self.every == self.every - 1:
            mean = sum(self.values) / len(self.values)
            print(f"{step + 1}: {self.text} {mean:.4f}, {time.perf_counter() - self.begin:.0f} s", flush=True)
            self.values.clear()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *sys.argv[2:])
