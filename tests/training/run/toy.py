"""A recipe for tests: tiny Llamas on random texts in buckets, with all that a resumed run could lose."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardit.core.comm.mesh import Mesh
from shardit.errors import InputError
from shardit.training.recipe import MicroBatch, TrainingRecipe
from shardit.training.run import checkpoint
from shardit.training.settings import TrainSettings
from tests.language import families


class Toy:
    """The data is "toy:N", N texts. The model is "toy" with words such as "nan:3", which say what happens in a step,
    counted from 1: nan:STEP, slow:SECONDS, kill:RANK:STEP, refuse:RANK:STEP, raise:RANK:STEP; "experts": two models;
    torn:FILE:STEP: SIGKILL in the middle of writing a file of a checkpoint;
    "still": without dropout; "last": only the last block is trained; draws:PATH: each rank writes the noises that its
    losses draw."""

    def __init__(self, settings: TrainSettings, mesh: Mesh):
        self.settings, self.mesh = settings, mesh
        self.words = dict((*word.split(":", 1), "")[:2] for word in settings.model.split())
        self.count = int(settings.data.partition(":")[2])
        self.drawn: list[float] = []
        if "torn" in self.words:
            tear(*self.words["torn"].split(":"))
        names = ("high", "low") if "experts" in self.words else ("decoder",)
        self.models: dict[str, nn.Module] = {name: made("still" in self.words) for name in names}
        for model in self.models.values() if "last" in self.words else ():
            for name, parameter in model.named_parameters():
                parameter.requires_grad = "layers.3." in name

    def recipe(self) -> TrainingRecipe:
        """Return the recipe."""
        epoch = len(self.epoch(0))
        together = self.settings.accumulation * self.mesh.sizes["dp"]
        return TrainingRecipe(
            models=self.models,
            loss=self.loss,
            micro_batches=self.micro_batches,
            steps_per_epoch=epoch / together,
            identity={"texts": self.count},
            save=save,
            held_out=lambda: [self.batch(number, [number], 0) for number in range(3)],
            sample=self.sample,
            notes=(f"{self.count} texts",),
        )

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of an epoch: texts of like length, in an order of its own."""
        draw = random.Random(f"{self.settings.seed} {number}")
        order = [item for item in range(self.count) for _ in range(self.settings.repeats)]
        draw.shuffle(order)
        size, batches = self.settings.batch_size, []
        for length in (0, 1):
            alike = [item for item in order if item % 2 == length]
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        draw.shuffle(batches)
        return batches

    def micro_batches(self, step: int, replica: int, replicas: int) -> list[MicroBatch]:
        """The micro-batches of a replica; the stream goes on over epochs."""
        self.misbehave(step)
        self.drawn = []  # what was drawn to see the course of the loss is not of a step
        length, each = len(self.epoch(0)), self.settings.accumulation
        start = (step * replicas + replica) * each
        return [
            self.batch(number, self.epoch(number // length)[number % length], step)
            for number in range(start, start + each)
        ]

    def batch(self, number: int, items: list[int], step: int) -> MicroBatch:
        """A micro-batch."""
        draw = random.Random(f"{self.settings.seed} {number} {items}")
        rows = [torch.randint(3, 100, (8 + 3 * (i % 2),), generator=torch.Generator().manual_seed(i)) for i in items]
        rows = [row * (draw.random() >= self.settings.caption_dropout) for row in rows]
        poison = float("nan") if self.words.get("nan") == str(step + 1) else 1.0
        data = {"ids": torch.stack(rows), "seed": draw.getrandbits(60), "scale": torch.tensor(poison)}
        model = draw.choice(list(self.models)) if number else next(iter(self.models))
        return MicroBatch(model, data, float(len(items)), tuple(f"text-{item}" for item in items))

    def loss(self, model: Any, data: Mapping[str, Any]) -> torch.Tensor:
        """The model's loss, with a factor of its own for each micro-batch."""
        noise = torch.rand((), generator=torch.Generator().manual_seed(data["seed"]))
        if "draws" in self.words and torch.is_grad_enabled():
            self.drawn.append(float(noise))
            Path(f"{self.words['draws']}-{self.mesh.rank}").write_text(" ".join(map(str, self.drawn)))
        found = model(input_ids=data["ids"], labels=data["ids"], use_cache=False).loss
        return found * (0.5 + noise) * data["scale"]

    def misbehave(self, step: int) -> None:
        """Do what the words of the model say for this step."""
        if "slow" in self.words:
            time.sleep(float(self.words["slow"]))
        for word, act in (("kill", kill), ("refuse", refuse), ("raise", fail)):
            rank, _, when = self.words.get(word, "").partition(":")
            if rank == str(self.mesh.rank) and when == str(step + 1):
                act()

    def sample(self, models: Mapping[str, nn.Module], folder: Path) -> list[Path]:
        """Write what the models make of a text; draw numbers and change modes without cleaning up."""
        written = []
        for name, model in models.items():
            model.train()
            model.eval()
            found: Any = model(input_ids=torch.arange(3, 12)[None], use_cache=False)
            torch.rand(random.randrange(5))
            if self.mesh.rank == 0:
                if self.words.get("full") == "disk":
                    raise OSError(28, "No space left on device")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{name}.txt").write_text(f"{found.logits.sum().item()}")
                written.append(folder / f"{name}.txt")
        return written


def made(still: bool) -> nn.Module:
    """A tiny model, with dropout unless it is `still`."""
    return families.make("llama", attention_dropout=0.0 if still else 0.1).train()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tear(name: str, step: str) -> None:
    """Let this process die when half of a file of the checkpoint of a step is on the disk."""
    whole = checkpoint._write

    def write(path: Path, write: Any) -> None:
        whole(path, write)
        if path.name == name and int(path.parent.name.rpartition("-")[2]) == int(step):
            os.truncate(path, path.stat().st_size // 2)
            kill()

    checkpoint._write = write


def refuse() -> None:
    raise InputError("text-3.txt is no text: repair it")


def fail() -> None:
    raise OSError("text-4.txt: the disk is gone")


def save(stages: Mapping[str, Any], folder: Path) -> None:
    """Save each model into a folder of its own."""
    for name, one in stages.items():
        one.save_pretrained(folder / name)


def recipe(settings: TrainSettings, mesh: Mesh, config: Any = None) -> TrainingRecipe:
    """The recipe, as modules of kinds of models have it."""
    return Toy(settings, mesh).recipe()
