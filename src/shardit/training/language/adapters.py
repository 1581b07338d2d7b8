"""What is trained of a language model: all weights, or a LoRA in modules that patterns choose."""

from __future__ import annotations

import difflib
import importlib.util
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from shardit.core.modules.blocks import find_blocks
from shardit.errors import InputError
from shardit.training.settings import TrainSettings

_SHOWN = 3
"""Nearest names in a message."""


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
    if importlib.util.find_spec("peft") is None:
        raise InputError("a LoRA needs the package peft: pip install peft, or train all weights with --full")
    from peft import LoraConfig, get_peft_model

    blocks = find_blocks(model)
    chosen = targets(model, [name for name, _ in blocks], settings.lora_targets)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,  # pyright: ignore
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.lora_rslora,
        target_modules=shortened(chosen, _adaptable(model)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    model.requires_grad_(False)
    with old_names():
        made: Any = get_peft_model(model, config)
    made.peft_config["default"].base_model_name_or_path = base
    return made, _line(made, chosen, blocks, settings)


def targets(model: nn.Module, blocks: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """Return the names of the modules that get an adapter: those that end in a pattern or match it as a regular
    expression; without patterns, all linears of the blocks. Raises InputError for a pattern that matches none."""
    able = _adaptable(model)
    chosen: set[str] = set()
    for pattern in patterns:
        found = _matching(pattern, able)
        if not found:
            raise InputError(
                f"lora_targets: no linear or embedding matches {pattern!r}{_nearest(pattern, model, able)}"
            )
        chosen.update(found)
    if not chosen:
        inside = tuple(f"{name}." for name in blocks)
        chosen = {name for name in able if name.startswith(inside) and not isinstance(able[name], nn.Embedding)}
    if not chosen:
        raise InputError(
            "the blocks of the model have no linears: choose modules with lora_targets, or train with full"
        )
    return [name for name in able if name in chosen]


def shortened(chosen: Sequence[str], able: Iterable[str]) -> list[str]:
    """Return ends of names for peft that stand for exactly the chosen modules; the whole names where there are none."""
    ends = sorted({name.rpartition(".")[2] for name in chosen})
    reached = {name for name in able if name.rpartition(".")[2] in ends}
    return ends if reached == set(chosen) else list(chosen)


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that peft can give an adapter, by name. A module under two names has its first one."""
    from transformers.pytorch_utils import Conv1D

    return {name: one for name, one in model.named_modules() if isinstance(one, (nn.Linear, nn.Embedding, Conv1D))}


def _matching(pattern: str, able: Iterable[str]) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"lora_targets: {pattern!r} is no regular expression ({error}): correct it") from error
    return [name for name in able if name == pattern or name.endswith(f".{pattern}") or expression.fullmatch(name)]


def _nearest(pattern: str, model: nn.Module, able: Iterable[str]) -> str:
    """Return the end of a message: the names that are most like a pattern, or that it is a module of another kind."""
    if any(name == pattern or name.endswith(f".{pattern}") for name, _ in model.named_modules()):
        inside = [name.rpartition(f"{pattern}.")[2] for name in able if f".{pattern}." in f".{name}"]
        return f", it is a module of other modules: name one of {', '.join(dict.fromkeys(inside))}" if inside else ""
    known = dict.fromkeys(end for name in able for end in _ends(name, pattern.count(".") + 1))
    near = difflib.get_close_matches(pattern, known, n=_SHOWN, cutoff=0.0)
    return f": the nearest names are {', '.join(near)}"


def _ends(name: str, most: int) -> list[str]:
    """Return the last parts of a name, up to a number of them."""
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, most + 1) if count <= len(parts)]


def _line(model: nn.Module, chosen: Sequence[str], blocks: Sequence[tuple[str, Any]], settings: TrainSettings) -> str:
    """Return the line that says what is trained."""
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in chosen}))
    with_adapter = sum(any(name.startswith(f"{block}.") for name in chosen) for block, _ in blocks)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    share = trained / sum(one.numel() for one in model.parameters())
    return (
        f"a LoRA of rank {settings.lora_rank} in {len(chosen)} modules ({kinds}) of {with_adapter} of {len(blocks)} "
        f"blocks: {trained:,} weights are trained, {share:.2%} of all"
    )
