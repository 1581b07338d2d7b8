"""Modules that get a LoRA adapter, chosen by patterns, and the settings of the adapter, for any model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from shardit.errors import InputError
from shardit.loading.missing_packages import check_installed
from shardit.training.settings import TrainSettings

_SHOWN = 3
"""Nearest names in a message."""


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that end in a pattern, from a dot on, or that it matches whole as a regular expression. Raises
    InputError for a pattern that is none."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"lora_targets: {pattern!r} is no regular expression ({error}): correct it") from error
    return [name for name in names if name == pattern or name.endswith(f".{pattern}") or expression.fullmatch(name)]


def matched(model: nn.Module, patterns: Iterable[str], able: Mapping[str, nn.Module]) -> list[str]:
    """Return the names that any pattern matches, of the modules that can have an adapter. Raises InputError for a
    pattern that matches none, with the nearest names."""
    found: set[str] = set()
    for pattern in patterns:
        names = matching(pattern, able)
        if not names:
            raise InputError(
                f"lora_targets: {pattern!r} matches no layer of {type(model).__name__}{_nearest(pattern, model, able)}"
            )
        found.update(names)
    return [name for name in able if name in found]


def ends_of(names: Iterable[str], parts: int = 1) -> list[str]:
    """Return the ends of names with up to so many parts, each once; a number at the end is no part of its own."""
    found: dict[str, None] = {}
    for name in names:
        split = name.split(".")
        least = 2 if split[-1].isdigit() and len(split) > 1 else 1
        found.update((".".join(split[-count:]), None) for count in range(least, least + parts) if count <= len(split))
    return list(found)


def shortened(chosen: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return ends of names for peft that stand for exactly the chosen modules, among all of these names; the whole
    names if there are none."""
    ends = sorted(ends_of(chosen))
    reached = {name for name in names if any(name == end or name.endswith(f".{end}") for end in ends)}
    return ends if reached == set(chosen) else list(chosen)


def lora_config(settings: TrainSettings, model: nn.Module, chosen: Sequence[str], **more: Any) -> Any:
    """Return the configuration of peft for an adapter in the chosen modules. Raises InputError without peft."""
    check_installed(("peft",))
    from peft import LoraConfig

    alpha = settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.lora_rslora,
        target_modules=shortened(chosen, (name for name, _ in model.named_modules())),
        **more,
    )


def _nearest(pattern: str, model: nn.Module, able: Iterable[str]) -> str:
    """Return the end of a message: the names that are most like a pattern, or that it is a module of another kind."""
    if any(name == pattern or name.endswith(f".{pattern}") for name, _ in model.named_modules()):
        inside = [name.rpartition(f"{pattern}.")[2] for name in able if f".{pattern}." in f".{name}"]
        return f", it is a module of other modules: name one of {', '.join(dict.fromkeys(inside))}" if inside else ""
    near = difflib.get_close_matches(pattern, ends_of(able, pattern.count(".") + 1), n=_SHOWN, cutoff=0.0)
    return f": the nearest names are {', '.join(near)}"
