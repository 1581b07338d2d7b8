"""Transformers with declared sequence plans, as an author would write them; no class of diffusers among them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardit.sp_plan import SequenceParallelInput, SequenceParallelOutput
from shardit.sp_sharding import sp_gather, sp_shard

HEADS, WIDTH = 6, 24


class Attention(nn.Module):
    """Attention of x over x, over text alone (cross), or of both over both (joint: text first, or last)."""

    def __init__(self, joint: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.joint = joint

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None, table=None, mask=None) -> Any:
        joined = x
        if other is not None and self.joint:
            joined = torch.cat([other, x] if self.joint == "first" else [x, other], dim=1)
        keys = other if other is not None and not self.joint else joined
        q, k, v = (
            m(t).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for m, t in ((self.q, joined), (self.k, keys), (self.v, keys))
        )
        if table is not None:
            q, k = q * table[:, None], k * table[:, None]
        out = self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        if keys is joined and other is not None:
            text = other.shape[1]
            return (out[:, text:], out[:, :text]) if self.joint == "first" else (out[:, :-text], out[:, -text:])
        return out


class Block(nn.Module):
    """Self-attention with positions, then attention to text."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.self_attention, self.cross = Attention(), Attention()

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, table: torch.Tensor, mask=None) -> torch.Tensor:
        hidden = hidden + self.self_attention(self.norm(hidden), table=table, mask=mask)
        return hidden + self.cross(self.norm(hidden), text)


class Positions(nn.Module):
    """A table over the tokens and one that is none of their business."""

    def forward(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.arange(tokens).view(1, tokens, 1) / 7 + torch.arange(4) / 3
        return table.cos() + 1.5, torch.ones(1)


class Model(nn.Module):
    """Blocks in a list, an output by name."""

    _sp_plan: Any = {
        "positions": {0: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "blocks.0": {"hidden": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "outputs.main": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.embed = Positions(), nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.outputs = nn.ModuleDict({"main": nn.Linear(WIDTH, 5), "other": nn.Linear(WIDTH, 3)})

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        table, _ = self.positions(x.shape[1])
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden, text, table, mask)
        return self.outputs["main"](hidden) + x.mean(1, keepdim=True)


_ = (sp_gather, sp_shard)
