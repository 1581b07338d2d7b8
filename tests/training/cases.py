"""What training meets beside plain models: dropout, checkpointing, adapters, writes in place, teachers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shardit.core.modules.blocks import find_blocks
from tests.language import families
from tests.training.models import Task, task, text_loss

LORA = ("to_q", "to_k", "to_v", "to_out.0")


def wan() -> Task:
    """A tiny Wan."""
    return task("WanTransformer3DModel")


def _changed(change: Callable[[Any], Any], base: Task, **others: Any) -> Task:
    def build() -> nn.Module:
        model: Any = base.build()
        return change(model) or model

    return replace(base, build=build, **others)


def _checkpointed(model: Any) -> None:
    model.train()
    model.enable_gradient_checkpointing()


def _checkpointed_text(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def lora(model: Any, targets: tuple[str, ...] = LORA) -> None:
    """Freeze a model and add an adapter with random weights."""
    from peft import LoraConfig

    model.requires_grad_(False)
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False))


def late_lora(model: Any) -> None:
    """An adapter in the last block alone."""
    lora(model, ("blocks.4.attn1.to_q", "blocks.4.attn1.to_v"))


def _dropping(model: Any) -> None:
    model.train()
    for _, block in find_blocks(model):
        for module in block.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3


def _dropping_and_checkpointed(model: Any) -> None:
    _checkpointed(model)
    _dropping(model)


def _seeded(loss: Any) -> Any:
    """A loss that seeds by its micro-batch, so that one rank draws the same in any order."""

    def seeded(model: Any, batch: Any) -> torch.Tensor:
        torch.manual_seed(int(batch["timestep"].sum() * 1000))
        return loss(model, {**batch, "hidden_states": batch["hidden_states"] + 0.1 * torch.randn(1)})

    return seeded


def _with_teacher(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        target = model(**batch).sample
        other = model(**{**batch, "timestep": batch["timestep"] * 0.5}).sample
    return ((model(**batch).sample - 0.5 * target + 0.1 * other) ** 2).mean()


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        shift = 0.0 if time is None else time
        return x + torch.tanh(self.linear(self.norm(x)) + shift)


class Odd(nn.Module):
    """A model whose code between blocks does one odd thing, chosen by its name."""

    def __init__(self, odd: str, width: int = 8, depth: int = 4):
        super().__init__()
        self.odd = odd
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.head = nn.Linear(width, width)
        if odd == "tied blocks":
            self.blocks[3].linear.weight = self.blocks[0].linear.weight
        if odd == "time embedding":
            self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        if odd == "weight norm":
            for block in self.blocks:
                torch.nn.utils.weight_norm(block.linear)  # pyright: ignore
        if odd == "tied ends":
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, kept = self.embed(x), []
        time = self.time(x.mean(1, keepdim=True)) if self.odd == "time embedding" else None
        for number, block in enumerate(self.blocks):
            h = self._block(block, h, time)
            if self.odd == "numpy":
                kept.append(torch.from_numpy(h.detach().numpy().copy()))
                continue
            if self.odd == "in place":
                h += 0.5 * x
                h.mul_(1.1)
            elif self.odd == "in place on a view":
                h[..., :2] *= 1.5
            elif self.odd == "made between":
                h = h * 1.2 + 0.1 * x
            elif self.odd == "transposed":
                h = h.transpose(0, 1) * 1.1
                h = h.transpose(0, 1)
            kept.append(h if self.odd != "made between" or number else h.sin())
        if self.odd in ("passes through", "numpy"):
            return self.head(h + kept[0] * 0.3 + kept[1])
        if self.odd == "made between":
            return self.head(h + kept[0])
        if self.odd == "parameter outside":
            return self.head(self.blocks[0].norm(h))
        return self.head(h)

    def _block(self, block: Any, h: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        if self.odd == "reentrant":
            out: Any = checkpoint(block, h, use_reentrant=True)
            return out
        if self.odd == "checkpointed":
            found: Any = checkpoint(block, h, use_reentrant=False)
            return found
        if self.odd == "time embedding":
            return block(h, time)
        if self.odd == "each block twice" or (self.odd == "one block twice" and block is self.blocks[1]):
            return block(block(h))
        return block(h)


ODD = (
    "in place",
    "in place on a view",
    "made between",
    "transposed",
    "passes through",
    "parameter outside",
    "tied blocks",
    "tied ends",
    "checkpointed",
    "time embedding",
    "each block twice",
    "one block twice",
    "weight norm",
)


def odd(name: str) -> Task:
    """A task of a model that does one odd thing."""

    def build() -> nn.Module:
        torch.manual_seed(3)
        return Odd(name)

    def batch(number: int, big: bool) -> torch.Tensor:
        return torch.randn(2, 6 if big else 3, 8, generator=torch.Generator().manual_seed(number))

    return Task(build, batch, lambda model, x: (model(x) ** 2).mean())


def cases() -> dict[str, Task]:
    """All cases that have to be right, by name."""
    base = wan()
    tied = Task(lambda: families.make("llama", tie_word_embeddings=True), task("llama").batch, text_loss)
    return {
        "checkpointing": _changed(_checkpointed, base),
        "checkpointing of a language model": _changed(_checkpointed_text, task("llama")),
        "lora": _changed(lora, base),
        "lora in the last block": _changed(late_lora, base),
        "lora, checkpointing": _changed(lambda model: (_checkpointed(model), lora(model))[-1], base),
        "dropout": _changed(_dropping, base, loss=_seeded(base.loss)),
        "dropout, checkpointing": _changed(_dropping_and_checkpointed, base, loss=_seeded(base.loss)),
        "teacher": replace(base, loss=_with_teacher),
        "tied embedding": tied,
        "two calls": replace(odd("plain"), loss=lambda model, x: (model(x) ** 2).mean() + model(-x).sin().mean()),
        **{name: odd(name) for name in ODD},
    }


def copies(batches: list[Any]) -> list[Any]:
    """Micro-batches of their own: a forward may empty its lists."""
    return copy.deepcopy(batches)
