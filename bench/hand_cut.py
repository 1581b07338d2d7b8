"""A Llama that is cut by hand for torch.distributed.pipelining, as its users do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B


class _Stage(nn.Module):
    """Half of the layers: the first half takes tokens, the second half returns logits."""

    def __init__(self, whole: Any, rank: int):
        super().__init__()
        layers = whole.model.layers
        half = len(layers) // 2
        self.layers = layers[:half] if rank == 0 else layers[half:]
        self.embed = whole.model.embed_tokens if rank == 0 else None
        self.norm, self.head = (whole.model.norm, whole.lm_head) if rank == 1 else (None, None)
        self.rotary = whole.model.rotary_emb

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            hidden = self.embed(hidden)
        places = torch.arange(hidden.shape[1])[None]
        rotary = self.rotary(hidden, places)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=places)
        return hidden if self.head is None or self.norm is None else self.head(self.norm(hidden))


class HandCut:
    """Two stages of a model, under torch's own 1F1B."""

    def __init__(self, whole: nn.Module, rank: int, count: int):
        stage = PipelineStage(_Stage(whole, rank), rank, 2, torch.device("cpu"))
        self.schedule, self.rank = Schedule1F1B(stage, count, loss_fn=_loss), rank

    def step(self, batches: list[Any]) -> Callable[[], torch.Tensor]:
        """Return a step over these micro-batches."""
        ids = torch.cat([one["input_ids"] for one in batches])

        def run() -> torch.Tensor:
            if self.rank == 0:
                self.schedule.step(ids)
                return torch.zeros(())  # the loss is on the other rank
            losses: list[torch.Tensor] = []
            self.schedule.step(target=ids, losses=losses)
            return torch.stack(losses).detach().mean()

        return run


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
