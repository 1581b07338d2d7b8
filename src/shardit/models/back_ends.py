"""Attention back ends of diffusers, by name."""

from __future__ import annotations

from typing import Any

from ..errors import InputError, first_line


def check_attention_backend(name: str | None) -> None:
    """Raises InputError for a name that diffusers does not know."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = sorted(member.value for member in AttentionBackendName if not member.value.startswith("_"))
    if name is not None and name.lower() not in {member.value for member in AttentionBackendName}:
        raise InputError(f"there is no attention back end {name!r}; diffusers has {', '.join(known)}")


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
