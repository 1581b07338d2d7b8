"""A small classifier of drawn clips: outline, colour, ground and direction. It judges clips that a model has made."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from model import pixels
from torch import Tensor, nn

from shardit.training.data import shapes


def choices_of(kind: str) -> dict[str, list[str]]:
    """Return the values of each attribute in a kind of drawn clips."""
    colours = list(shapes.COLOURS)
    directions = list(shapes.KINDS[kind])
    return {"outline": list(shapes.OUTLINES), "colour": colours, "ground": colours, "direction": directions}


CHOICES = choices_of("moving")
_LOOKS = 5
"""Frames that it looks at."""


class Classifier(nn.Module):
    """Takes clips (N, 3, frames, height, width) in [-1, 1]; returns logits by attribute. kind: of the clips."""

    def __init__(self, kind: str = "moving") -> None:
        super().__init__()
        self.kind, self.choices = kind, choices_of(kind)
        sizes = [(3 * _LOOKS, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 1), (64, 96, 2)]
        self.features = nn.Sequential(*(_layer(*one) for one in sizes))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * 96, len(names)) for name, names in self.choices.items()})

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        last = clips.shape[2] - 1
        looks = clips[:, :, [round(number * last / (_LOOKS - 1)) for number in range(_LOOKS)]].flatten(1, 2)
        found = self.features(looks)
        both = torch.cat([found.mean((2, 3)), found.amax((2, 3))], 1)
        return {name: head(both) for name, head in self.heads.items()}

    @torch.no_grad()
    def attributes(self, clips: Tensor) -> list[dict[str, str]]:
        """Return the most likely attributes of each clip."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(clips).items()}
        return [{name: self.choices[name][of[number]] for name, of in best.items()} for number in range(len(clips))]


def _layer(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.GELU())


def batch_of(drawings: Sequence[shapes.Drawing]) -> Tensor:
    """Return drawn clips as (N, 3, frames, height, width) in [-1, 1], with the frames alone that are looked at."""
    return torch.stack([pixels(one, _LOOKS) for one in drawings])


def trained(kind: str = "moving", steps: int = 700, batch: int = 32, seed: int = 1) -> Classifier:
    """Train a classifier on drawn clips of a kind, with other brightness, contrast and noise, as a decoder adds."""
    torch.manual_seed(seed)
    draw, model = random.Random(seed), Classifier(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        # Captions that the trained model has never seen have to be judged, too.
        drawings = [
            shapes.drawing(draw.randrange(10**9), seed=7, kind=kind, held_out=draw.random() < 0.2) for _ in range(batch)
        ]
        clips = batch_of(drawings)
        clips = clips * (1 + 0.15 * torch.randn(batch, 3, 1, 1, 1)) + 0.1 * torch.randn(batch, 3, 1, 1, 1)
        clips = clips + 0.1 * torch.rand(batch, 1, 1, 1, 1) * torch.randn_like(clips)
        loss = torch.zeros(())
        for name, logits in model(clips).items():
            right = torch.tensor([model.choices[name].index(getattr(one, name)) for one in drawings])
            loss = loss + nn.functional.cross_entropy(logits, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


def accuracy(model: Classifier, count: int = 200, seed: int = 11) -> dict[str, float]:
    """Return the share of drawn clips, with captions held out, whose attributes the classifier names."""
    drawings = [shapes.drawing(number, seed=seed, kind=model.kind, held_out=True) for number in range(count)]
    found = model.attributes(batch_of(drawings))
    return {
        name: sum(one[name] == getattr(right, name) for one, right in zip(found, drawings, strict=True)) / count
        for name in model.choices
    }
