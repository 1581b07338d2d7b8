"""Attention back ends of diffusers, by name."""

from __future__ import annotations

import ast
from typing import Any

from shardit.diffusion.loading.diffusers_source import definition
from shardit.errors import InputError, first_line


def check_attention_backend(name: str | None) -> None:
    """Raises InputError for a name that the installed diffusers does not know. Imports nothing of it."""
    if name is None or not (known := backend_names()) or name.lower() in known:
        return
    shown = sorted(each for each in known if not each.startswith("_"))
    raise InputError(f"there is no attention back end {name!r}; diffusers has {', '.join(shown)}")


def backend_names() -> list[str]:
    """The names that diffusers knows, read from its source; [] where that cannot be read."""
    node = definition("AttentionBackendName", "models")
    values = (line.value for line in ([] if node is None else node.body) if isinstance(line, ast.Assign))
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def use_attention_backend(name: str | None, model: Any) -> None:
    """Let a transformer of diffusers use a back end. Raises InputError where it, or this machine, cannot."""
    if name is None:
        return
    check_attention_backend(name)
    kind = type(model).__name__
    if not hasattr(model, "set_attention_backend"):
        raise InputError(f"attention_backend={name!r}: {kind} has no choice of back ends; leave it out")
    try:
        model.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        first = first_line(error)
        raise InputError(f"attention_backend={name!r} cannot be used for {kind}: {first}") from error
