"""LoRA adapters: which modules get one, by patterns, and how they are added."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from shardit.errors import InputError
from shardit.training.settings import TrainSettings

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Ends of the names of attention projections in models of diffusers; adapted without other patterns."""

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The same of the text encoders that are trained."""


def targets(model: nn.Module, patterns: Sequence[str], usual: Sequence[str] = ATTENTION) -> tuple[list[str], list[str]]:
    """Return the names of the modules that get an adapter, and the patterns that say so. A pattern is the end of a
    name, from a dot on, or a regular expression for a whole name.

    Raises InputError for a pattern without a module, with the nearest names.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    if not patterns:
        used = [pattern for pattern in usual if _matching(pattern, names)]
        if not used:
            raise InputError(
                f"{type(model).__name__} has none of {', '.join(usual)}: name modules in lora_targets, such as "
                f"{', '.join(sorted(_ends(names))[:3])}"
            )
        patterns = used
    found: set[str] = set()
    for pattern in patterns:
        matching = _matching(pattern, names)
        if not matching:
            near = _near(pattern, names)
            raise InputError(f"lora_targets: {pattern!r} matches no layer of {type(model).__name__}; nearest: {near}")
        found.update(matching)
    return [name for name in names if name in found], list(patterns)


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    ends = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    if ends:
        return ends
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise InputError(f"lora_targets: {pattern!r} is no regular expression ({error})") from error
    return [name for name in names if wanted.fullmatch(name)]


def _near(pattern: str, names: Sequence[str]) -> str:
    ends = _ends(names)
    near = difflib.get_close_matches(pattern, ends, n=3, cutoff=0.4) or sorted(ends)[:5]
    return ", ".join(near)


def _ends(names: Collection[str]) -> list[str]:
    """Return the short forms of names: the last part, with the one before in front of a number."""
    found = set()
    for name in names:
        *before, last = name.split(".")
        found.add(f"{before[-1]}.{last}" if last.isdigit() and before else last)
    return sorted(found)


def add_lora(model: Any, settings: TrainSettings, *, text: bool = False) -> str:
    """Freeze a model and add an adapter, in float32; return a line for the user. text: it is a text encoder, to whose
    attention projections an adapter is added, whatever the settings name."""
    from peft import LoraConfig, inject_adapter_in_model

    names, patterns = targets(model, (), TEXT_ATTENTION) if text else targets(model, settings.lora_targets)
    short = all(_as_end(pattern, names, model) for pattern in patterns)
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # the same first weights on each rank
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=_alpha(settings),
            lora_dropout=settings.lora_dropout,
            use_rslora=settings.lora_rslora,
            target_modules=sorted(patterns) if short else names,
        )
        if text:
            inject_adapter_in_model(config, model)
        else:
            model.add_adapter(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    layers = sum(isinstance(module, ADAPTABLE) for name, module in model.named_modules() if "lora_" not in name)
    adapted = sum(hasattr(module, "lora_A") for module in model.modules())
    if adapted != len(names):
        raise InputError(f"lora_targets: {adapted} modules got an adapter instead of {len(names)}: name them in full")
    weights = sum(parameter.numel() for parameter in trained)
    return (
        f"LoRA of rank {settings.lora_rank} on {adapted} of {layers} layers ({adapted / layers:.0%}): "
        f"{', '.join(patterns)}; {weights:,} weights"
    )


def _alpha(settings: TrainSettings) -> Any:
    alpha = settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    return int(alpha) if float(alpha).is_integer() else alpha


def _as_end(pattern: str, names: Sequence[str], model: nn.Module) -> bool:
    """Return whether peft, which matches ends of names of modules of any kind, finds the same modules."""
    found = [name for name, _ in model.named_modules() if name == pattern or name.endswith(f".{pattern}")]
    return bool(found) and set(found) <= set(names)
