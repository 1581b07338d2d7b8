"""Models with units that are not what their names and shapes say, for tensor ranks: right all the same, or whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from torch import nn

WIDTH, HEADS, ROWS = 32, 4, 1040


class ScaledTable(nn.Embedding):
    """As the scaled embedding of Gemma 3."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3.0


class AliasTable(nn.Embedding):
    """Derived, with the forward of its base."""


class ScaledLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3.0


class CentredNorm(RMSNorm):
    """Takes the mean of all channels off first."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class NormedGELU(GELU):
    """Knows of all hidden channels."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = super().forward(hidden_states)
        return hidden_states / hidden_states.std(-1, keepdim=True)


class NormedFeedForward(FeedForward):
    """Its code, not a part of it, knows of all hidden channels."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = self.net[0](hidden_states)
        return self.net[2](hidden / hidden.abs().amax(-1, keepdim=True))


class OffsetFeedForward(FeedForward):
    """Derived, and right on slices."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(hidden_states) + 1.0


class ScaledProcessor(AttnProcessor2_0):
    """Right on slices: it takes everything from what it is given."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(attn, hidden_states * 0.5, *args, **kwargs)


class MixingProcessor:
    """Mixes heads (talking heads), so a rank's own are not enough."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query, key, value = (
            linear(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        scores = (query @ key.transpose(-1, -2)).softmax(-1)
        out = (scores - 0.5 * scores.mean(1, keepdim=True)) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class FullWidthProcessor(AttnProcessor2_0):
    """Counts on the width that the model has; fails on slices."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shape = (*hidden_states.shape[:2], HEADS, WIDTH // HEADS)
        query, key, value = (
            linear(hidden_states).reshape(shape).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


class Store:
    """Where a processor puts what others read."""

    def __init__(self) -> None:
        self.maps: list[torch.Tensor] = []


class StoringProcessor:
    """Hands its attention maps to whoever has the store."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query, key, value = (
            attn.head_to_batch_dim(linear(hidden_states)) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        scores = attn.get_attention_scores(query, key)
        (self.store if isinstance(self.store, list) else self.store.maps).append(scores)
        return attn.to_out[0](attn.batch_to_head_dim(scores @ value))


class RememberingProcessor(StoringProcessor):
    """Puts them on the attention module instead."""

    def __init__(self) -> None:
        super().__init__([])

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = super().__call__(attn, hidden_states)
        attn.maps = self.store.pop()
        return out


class WeightedProcessor(nn.Module):
    """Has weights that nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.linspace(0, 1, WIDTH))

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return AttnProcessor2_0()(attn, hidden_states) * self.gate


class Block(nn.Module):
    """Attention and feed-forward; `parts` are put in their place."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.attn = Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, qk_norm="rms_norm")
        self.ff = parts.get("ff") or FeedForward(WIDTH, activation_fn="gelu")
        if "processor" in parts:
            self.attn.set_processor(parts["processor"])
        for path in [path for path in parts if "." in path]:
            self.set_submodule(path, parts[path])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.ff(x)


class Model(nn.Module):
    """A table, two blocks alike, and a head whose outputs are gathered."""

    def __init__(self, make: Callable[[], Block], table: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        self.table = table(ROWS, WIDTH)
        self.blocks = nn.ModuleList(make() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def _norms(norm: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    """Norms of the channels of one head."""
    return {"attn.norm_q": norm(WIDTH // HEADS, 1e-6), "attn.norm_k": norm(WIDTH // HEADS, 1e-6)}


def hooked() -> Block:
    """Somebody looks at the queries, and changes them."""
    block = Block()
    block.attn.to_q.register_forward_hook(lambda module, args, out: out / out.abs().amax(-1, keepdim=True))
    return block


def activated() -> Block:
    block = Block()
    block.ff.net[0] = NormedGELU(WIDTH, 4 * WIDTH)
    return block


CASES: dict[str, tuple[Callable[[], Any], tuple[str, ...], tuple[str, ...]]] = {
    # name: how it is made, what stays whole from the start, what turns out to need it
    "plain": (lambda: Model(Block), (), ()),
    "scaled table": (lambda: Model(Block, ScaledTable), ("table",), ()),
    "table with another name": (lambda: Model(Block, AliasTable), (), ()),
    "scaled query": (lambda: Model(lambda: Block(**{"attn.to_q": ScaledLinear(WIDTH, WIDTH)})), ("attn",), ()),
    "scaled head": (lambda: _with_head(ScaledLinear(WIDTH, 64)), (), ()),
    "hook": (lambda: Model(hooked), ("attn",), ()),
    "activation": (lambda: Model(activated), ("ff",), ()),
    "feed-forward": (lambda: Model(lambda: Block(ff=NormedFeedForward(WIDTH, activation_fn="gelu"))), (), ("ff",)),
    "feed-forward, right": (lambda: Model(lambda: Block(ff=OffsetFeedForward(WIDTH))), (), ()),
    "norm of a head": (lambda: Model(lambda: Block(**_norms(CentredNorm))), (), ()),
    "processor, right": (lambda: Model(lambda: Block(processor=ScaledProcessor())), (), ()),
    "processor mixes heads": (lambda: Model(lambda: Block(processor=MixingProcessor())), (), ("attn",)),
    "processor fails": (lambda: Model(lambda: Block(processor=FullWidthProcessor())), (), ("attn",)),
    "processor with weights": (lambda: Model(lambda: Block(processor=WeightedProcessor())), ("attn",), ()),
    "processor remembers": (lambda: Model(lambda: Block(processor=RememberingProcessor())), (), ("attn",)),
}


def _with_head(head: nn.Linear) -> Model:
    model = Model(Block)
    model.lm_head = head
    return model
