"""Tiny models to train, their micro-batches and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from shardit.core.modules.hints import Plan
from shardit.core.training.gradients.slices import TensorSlices
from tests.language import families
from tests.support import survey_models
from tests.support.survey_models import Draw

IMAGES = (
    "WanTransformer3DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
)
TEXTS = ("llama", "gemma3_text", "mixtral")
"""Names of tasks that are tried in more ways than others."""


@dataclass(frozen=True)
class Task:
    """What is trained: build() makes the model, batch(number, big) a micro-batch."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, bool], Any]
    loss: Callable[[Any, Any], torch.Tensor]
    plan: Plan | None = None


def task(name: str) -> Task:
    """Return the task of a class of diffusers, or of a family of language models."""
    if name in survey_ids():
        entry = survey_models.entry(name)
        plan = Plan(replicate=entry.replicate) if entry.replicate else None
        return Task(
            lambda: _settled(entry.build()),
            lambda number, big: entry.inputs(Draw(100 + number, big)),
            picture_loss,
            plan,
        )
    return Task(lambda: families.make(name), _texts, text_loss)


def _settled(model: Any) -> nn.Module:
    """Give a parameter that diffusers leaves as it finds memory the same values on every rank."""
    if hasattr(model, "pad_token"):
        torch.nn.init.constant_(model.pad_token, 0.5)
    return model


def survey_ids() -> list[str]:
    """Return the names of all classes of diffusers that the survey has."""
    return [entry.id for entry in survey_models.all_entries()]


def picture_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """A loss over all outputs of a transformer."""
    outputs = [t for t in tree_leaves(model(**batch)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return torch.stack([(out.float() ** 2).mean() + (out.float() * 0.3).mean() for out in outputs]).sum()


def text_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """The causal loss of a language model itself."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def _texts(number: int, big: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(50 + number)
    return torch.randint(3, families.VOCABULARY, (2, 14 if big else 11), generator=generator)


def accumulate(model: nn.Module, loss: Any, batches: list[Any], weights: list[float] | None = None) -> float:
    """Forward and backward of one rank over the micro-batches, plainly; return the mean loss."""
    shares = weights or [1.0] * len(batches)
    total = 0.0
    for batch, share in zip(batches, shares, strict=True):
        value = loss(model, batch) * (share / sum(shares))
        value.backward()
        total += value.item()
    return total


def worst(
    named: Any, plain: nn.Module, slices: TensorSlices | None = None, others: Sequence[nn.Module] = ()
) -> tuple[float, int, list[str]]:
    """Compare gradients: the largest relative difference, how many were compared, and names of those that only one
    of the two has. slices: those of a tensor rank are compared with the same parts of whole gradients. others: models
    with other last bits, see `rounded`; differences are counted as far as they exceed those of these models."""
    expected = dict(plain.named_parameters())
    moved = [dict(other.named_parameters()) for other in others]
    largest, count, only = 0.0, 0, []
    for name, parameter in named:
        cut = slices.cuts.get(name) if slices is not None else None
        got = parameter.grad
        want, *near = (
            one if one is None or cut is None or slices is None else cut.of(slices.index).take(one)
            for one in (expected[name].grad, *(other[name].grad for other in moved))
        )
        if want is None or not want.numel() or float(want.abs().max()) < 1e-9:
            if got is not None and got.numel() and float(got.abs().max()) > 1e-8:
                only.append(f"{name}: a gradient where one rank has none")
        elif got is None:
            only.append(f"{name}: no gradient")
        else:
            count += 1
            floor = max((_apart(one, want) for one in near if one is not None), default=0.0)
            largest = max(largest, max(0.0, _apart(got, want) - ROUNDING * floor) / float(want.double().norm()))
    return largest, count, only


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm())


ROUNDING = 4
"""Times the effect of other last bits of the weights that a difference may be."""


def rounded(chosen: Task, count: int, seed: int) -> nn.Module:
    """Return one rank's model with the gradients of a step in which each weight has another last bit."""
    made = chosen.build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (one for one in made.parameters() if one.is_floating_point()):
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))
    accumulate(made, chosen.loss, [chosen.batch(number, False) for number in range(count)])
    return made
