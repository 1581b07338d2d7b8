"""Trained weights of a language model: all, or a LoRA in modules that patterns choose."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from shardit.core.modules.blocks import find_blocks
from shardit.errors import InputError
from shardit.training.lora import lora_config, matched
from shardit.training.settings import TrainSettings


@contextmanager
def old_names() -> Iterator[None]:
    """Hide the warnings of transformers about names that peft and earlier versions of transformers use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def train_all(model: nn.Module) -> str:
    """Make all weights of a model trainable; return a line for the user."""
    model.requires_grad_(True)
    return f"all {sum(one.numel() for one in model.parameters()):,} weights are trained"


def add_lora(model: Any, settings: TrainSettings, base: str) -> tuple[nn.Module, str]:
    """Return a model of peft around a model whose own weights are frozen, and a line for the user. base: the name of
    the model that the files of the adapter state.

    Raises InputError for a pattern that matches no module.
    """
    blocks = find_blocks(model)
    chosen = targets(model, [name for name, _ in blocks], settings.lora_targets)
    config = lora_config(settings, model, chosen, task_type="CAUSAL_LM", base_model_name_or_path=base)
    from peft import get_peft_model

    model.requires_grad_(False)
    with old_names():
        made: Any = get_peft_model(model, config)
    made.peft_config["default"].base_model_name_or_path = base
    return made, _line(made, chosen, blocks, settings)


def targets(model: nn.Module, blocks: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """Return the names of the modules that get an adapter: those that end in a pattern or match it as a regular
    expression; without patterns, all linears of the blocks. Raises InputError for a pattern that matches none."""
    able = _adaptable(model)
    chosen = matched(model, patterns, able)
    if not chosen:
        inside = tuple(f"{name}." for name in blocks)
        chosen = [name for name in able if name.startswith(inside) and not isinstance(able[name], nn.Embedding)]
    if not chosen:
        raise InputError(
            "the blocks of the model have no linears: choose modules with lora_targets, or train with full"
        )
    return chosen


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that peft can give an adapter, by name. A module under two names has its first one."""
    from transformers.pytorch_utils import Conv1D

    return {name: one for name, one in model.named_modules() if isinstance(one, (nn.Linear, nn.Embedding, Conv1D))}


def _line(model: nn.Module, chosen: Sequence[str], blocks: Sequence[tuple[str, Any]], settings: TrainSettings) -> str:
    """Return the line that names the trained weights."""
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in chosen}))
    with_adapter = sum(any(name.startswith(f"{block}.") for name in chosen) for block, _ in blocks)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    share = trained / sum(one.numel() for one in model.parameters())
    return (
        f"a LoRA of rank {settings.lora_rank} in {len(chosen)} modules ({kinds}) of {with_adapter} of {len(blocks)} "
        f"blocks: {trained:,} weights are trained, {share:.2%} of all"
    )
