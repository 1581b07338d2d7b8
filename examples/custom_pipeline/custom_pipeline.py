"""A pipeline of one's own on any axis. Nothing in the model or in the loop knows of ranks.

python examples/custom_pipeline/custom_pipeline.py
torchrun --nproc-per-node=2 examples/custom_pipeline/custom_pipeline.py --ulysses_degree=2
torchrun --nproc-per-node=4 examples/custom_pipeline/custom_pipeline.py --cfg_parallel_size=2 --pipeline_parallel_size=2
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import shardit

DIM, HEADS, LAYERS = 64, 4, 4


class Block(nn.Module):
    """Attention to all tokens and to the text, then a feed-forward. The names of its linears are usual ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attn, self.cross = Attention(), Attention()
        self.ff = FeedForward()

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm(hidden) + time, None)
        hidden = hidden + self.cross(self.norm(hidden), text)
        return hidden + self.ff(self.norm(hidden))


class Attention(nn.Module):
    """Attention of a diffusion transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, hidden: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        source = hidden if text is None else text
        q, k, v = self.to_q(hidden), self.to_k(source), self.to_v(source)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class Transformer(nn.Module):
    """Predicts the velocity of tokens of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, DIM), nn.Linear(DIM, 16)
        self.time = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, latents: torch.Tensor, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        hidden, time = self.into(latents), self.time(t.view(-1, 1, 1))
        for block in self.blocks:
            hidden = block(hidden, text, time)
        return self.out(hidden)


class Pipeline:
    """Maps words to tokens in a given number of steps. Modules to shard are attributes; the one
    that denoises is called `transformer`."""

    def __init__(self) -> None:
        torch.manual_seed(0)  # the same weights on every rank; a checkpoint does that as well
        self.text_encoder = nn.Embedding(1000, DIM)
        self.transformer = Transformer()

    @torch.no_grad()
    def __call__(self, prompt: str, negative_prompt: str = "", steps: int = 4, scale: float = 3.0) -> torch.Tensor:
        wanted, unwanted = (self.text_encoder(words(text)) for text in (prompt, negative_prompt))
        latents = torch.randn(1, 21, 16, generator=torch.Generator().manual_seed(1))
        for step in range(steps):
            t = torch.tensor([1 - step / steps])
            positive = self.transformer(latents, wanted, t)
            negative = self.transformer(latents, unwanted, t)
            latents = latents - (negative + scale * (positive - negative)) / steps
        return latents


def words(text: str) -> torch.Tensor:
    """Five numbers for a text."""
    return torch.tensor([[sum(map(ord, word)) % 1000 for word in (text.split() + ["_"] * 5)[:5]]])


def config_of(arguments: list[str]) -> shardit.DiffusionParallelConfig:
    """--name=2 for any size of a DiffusionParallelConfig."""
    sizes = dict(argument.removeprefix("--").replace("-", "_").split("=") for argument in arguments)
    return shardit.DiffusionParallelConfig(**{name: int(size) for name, size in sizes.items()})


if __name__ == "__main__":
    pipe = shardit.parallelize(Pipeline(), config_of(sys.argv[1:]))
    print(f"sum of the result: {float(pipe('a red fox').sum()):.4f}")
