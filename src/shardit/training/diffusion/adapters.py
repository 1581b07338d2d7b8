"""LoRA adapters: which modules get one, by patterns, and how they are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shardit.errors import InputError
from shardit.training.lora import ends_of, lora_config, matched, matching
from shardit.training.settings import TrainSettings

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Ends of the names of attention projections in models of diffusers; adapted without other patterns."""

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The same of the text encoders that are trained."""


def targets(model: nn.Module, patterns: Sequence[str], usual: Sequence[str] = ATTENTION) -> tuple[list[str], list[str]]:
    """Return the names of the modules that get an adapter, and their patterns. A pattern is the end of a
    name, from a dot on, or a regular expression for a whole name.

    Raises InputError for a pattern without a module, with the nearest names.
    """
    able = {name: module for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    if not patterns:
        patterns = [pattern for pattern in usual if matching(pattern, able)]
        if not patterns:
            raise InputError(
                f"{type(model).__name__} has none of {', '.join(usual)}: name modules in lora_targets, such as "
                f"{', '.join(sorted(ends_of(able))[:3])}"
            )
    return matched(model, patterns, able), list(patterns)


def add_lora(model: Any, settings: TrainSettings, *, text: bool = False) -> str:
    """Freeze a model and add an adapter, in float32; return a line for the user. text: it is a text encoder, to whose
    attention projections an adapter is added, whatever the settings name."""
    names, patterns = targets(model, (), TEXT_ATTENTION) if text else targets(model, settings.lora_targets)
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # the same first weights on each rank
        config = lora_config(settings, model, names)
        if text:
            from peft import inject_adapter_in_model

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
