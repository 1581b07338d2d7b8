"""Transformers with declared sequence plans, as an author would write them; none is a class of diffusers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardit import parallel_state as ps
from shardit.core.comm.collectives import even_sizes
from shardit.sp_plan import SequenceParallelInput, SequenceParallelOutput
from shardit.sp_sharding import sp_gather, sp_shard

HEADS, WIDTH = 6, 24
GATHER = SequenceParallelOutput(gather_dim=1, expected_dims=3)


def split(dim: int = 1, dims: int | None = 3, output: bool = False, pad: bool = False) -> SequenceParallelInput:
    """An entry of a plan."""
    return SequenceParallelInput(split_dim=dim, expected_dims=dims, split_output=output, auto_pad=pad)


class Attention(nn.Module):
    """Attention of x to itself, to another sequence, or (joint) of both together."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, keys: torch.Tensor, table: Any = None, mask: Any = None) -> torch.Tensor:
        q, k, v = (m(t).unflatten(2, (HEADS, -1)) for m, t in ((self.q, x), (self.k, keys), (self.v, keys)))
        if table is not None:
            q, k = q * table.unsqueeze(2), k * table.unsqueeze(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention with positions, then attention to text."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.own, self.cross = Attention(), Attention()

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, table: Any = None, mask: Any = None) -> torch.Tensor:
        x = self.norm(hidden)
        hidden = hidden + self.own(x, x, table, mask)
        return hidden + self.cross(self.norm(hidden), text)


class Positions(nn.Module):
    """A table over the tokens, and something that has no tokens."""

    def forward(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.arange(tokens).view(1, tokens, 1) / 7 + torch.arange(WIDTH // HEADS) / 3
        return table.cos() + 1.5, torch.ones(1)


class Model(nn.Module):
    """Self- and cross-attention; blocks in a list, outputs by name."""

    _sp_plan: Any = {
        "positions": {0: split(output=True)},
        "blocks.0": {"hidden": split()},
        "outputs.main": GATHER,
    }

    def __init__(self, plan: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.embed = Positions(), nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.outputs = nn.ModuleDict({"main": nn.Linear(WIDTH, 5), "other": nn.Linear(WIDTH, 3)})
        if plan is not None:
            self._sp_plan = plan

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        table, _ = self.positions(x.shape[1])
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden, text, table=table, mask=mask)
        return self.outputs["main"](hidden) + x.mean(1, keepdim=True)


PADDED: Any = {
    "positions": {0: split(output=True, pad=True)},
    "blocks.0": {"hidden": split(pad=True)},
    "outputs.main": GATHER,
}
PADDED_MASK: Any = {**PADDED, "blocks.*": {"mask": split(3, 4, pad=True)}}
SPLIT_MASK: Any = {**Model._sp_plan, "blocks.*": {"mask": split(-1, 4)}}


class JointBlock(nn.Module):
    """Two streams with one attention; text comes first or last in it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.norm, self.attention, self.first = nn.LayerNorm(WIDTH), Attention(), first

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(torch.cat([text, hidden] if self.first else [hidden, text], dim=1))
        out = self.attention(x, x, mask=mask)
        count = text.shape[1]
        of_text, of_hidden = (out[:, :count], out[:, count:]) if self.first else (out[:, -count:], out[:, :-count])
        return hidden + of_hidden, text + of_text


class Joint(nn.Module):
    """Joint attention; the text is on every rank, or split as well. Returns both streams."""

    def __init__(self, first: bool, split_text: bool, pad: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([JointBlock(first) for _ in range(3)])
        self.out, self.text_out = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)
        streams = {"hidden": split(pad=pad), **({"text": split(pad=pad)} if split_text else {})}
        self._sp_plan = {"blocks.0": streams, "out": GATHER, **({"text_out": GATHER} if split_text else {})}

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: Any = None) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            x, text = block(x, text, mask)
        return {"x": self.out(x), "text": self.text_out(text)}


class Single(nn.Module):
    """One stream of text and image; text tokens stay whole in front of it. Split at the model's own inputs."""

    _sp_plan: Any = {"": {"x": split()}, "out": GATHER}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([text, x], dim=1)
        for block in self.blocks:
            hidden = block(hidden, text)
        return self.out(hidden[:, text.shape[1] :])


class ByHand(nn.Module):
    """Decides at run time what is split: the tokens that are left after some were dropped."""

    _sp_plan: Any = {}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.asks = True

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        kept = x[:, x[0, :, 0] > 0]  # as many as there happen to be
        mine = sp_shard(kept, 1)
        assert not self.asks or mine.shape[1] == even_sizes(kept.shape[1], ps.get_sp_world_size())[ps.get_sp_rank()]
        hidden = self.blocks[0](mine, text)
        middle = sp_gather(hidden, 1)
        hidden = sp_shard(middle - middle.mean(1, keepdim=True), 1)
        return sp_gather(self.blocks[2](self.blocks[1](hidden, text), text), dim=1)


class Pipeline:
    """A pipeline that is no diffusers class: guidance over a transformer of one's own."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.scale = transformer, 3.0

    @property
    def components(self) -> dict[str, Any]:
        """Its parts by name."""
        return {"transformer": self.transformer, "scale": self.scale}

    def __call__(self, x: torch.Tensor, text: torch.Tensor, negative_prompt: torch.Tensor, steps: int = 3) -> Any:
        with torch.no_grad():
            for _ in range(steps):
                yes, no = self.transformer(x, text), self.transformer(x, negative_prompt)
                x = x - 0.1 * (no + self.scale * (yes - no))
        return x
