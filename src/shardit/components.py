"""What a pipeline is made of, and what of it may not be there when it is made parallel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import InputError, UnsupportedError
from .mixins import CFGParallelMixin


def components_of(target: Any) -> dict[str, nn.Module] | None:
    """The modules of a pipeline by name; None for a module that is to be spread by itself.

    A pipeline has `components` (as those of diffusers have), or its modules are its attributes. Raises InputError
    where there are none.
    """
    if isinstance(target, nn.Module) and not isinstance(target, CFGParallelMixin):
        return None
    found = getattr(target, "components", None)
    if not isinstance(found, dict):
        found = dict(target.named_children()) if isinstance(target, nn.Module) else getattr(target, "__dict__", {})
    modules = {name: part for name, part in found.items() if isinstance(part, nn.Module)}
    if not modules:
        raise InputError(f"parallelize takes a module or a pipeline that has modules, not {type(target).__name__}")
    return modules


def device_of(modules: dict[str, nn.Module]) -> torch.device:
    """Where the modules are."""
    parameter = next((p for module in modules.values() for p in module.parameters()), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def refuse_hooks(modules: dict[str, nn.Module]) -> None:
    """Raise UnsupportedError for what cannot be kept when modules are spread."""
    for name, module in modules.items():
        if getattr(module, "is_cache_enabled", False):
            raise UnsupportedError(f"{name} has a step cache enabled: call disable_cache() before parallelize")
        if any(hasattr(part, "_hf_hook") for part in module.modules()):
            raise UnsupportedError(f"{name} is offloaded: load the pipeline without CPU offload before parallelize")
