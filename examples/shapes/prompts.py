"""The text encoder of tiny/shapes: `UMT5EncoderModel`, trained so that each of its tokens tells all attributes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from classifier import CHOICES
from torch import nn

from shardit.training.data import shapes


def train(model: Any, tokenizer: Any, steps: int, report: Callable[[int, float], None], seed: int = 0) -> None:
    """Train the encoder on captions. report: called with step and loss.

    A random encoder tells words apart, but not which of two colours is that of the shape; the video model would have to
    learn that from pictures, which takes far longer.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    heads = nn.ModuleDict({name: nn.Linear(model.config.d_model, len(names)) for name, names in CHOICES.items()})
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        drawings = [shapes.drawing(draw.randrange(10**9), seed=13) for _ in range(32)]
        words = tokenizer([one.caption for one in drawings], padding=True, return_tensors="pt")
        states, mask = model(**words).last_hidden_state, words.attention_mask.bool()
        loss = torch.zeros(())
        for name, head in heads.items():
            right = torch.tensor([CHOICES[name].index(getattr(one, name)) for one in drawings])
            each = right[:, None].expand(mask.shape)[mask]
            loss = loss + nn.functional.cross_entropy(head(states)[mask], each)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        report(step, loss.item())
    model.eval()
