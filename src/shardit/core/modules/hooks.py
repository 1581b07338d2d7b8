"""Forward hooks on modules: those of libraries and those of users."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

_libraries = {"torch"}
"""Packages whose hooks belong to a module: they act on the rank that runs it. All other hooks are users' and observe or
change the module from outside."""


def add_libraries(packages: Iterable[str]) -> None:
    """Add the packages of a model family, before a model of it becomes parallel."""
    _libraries.update(packages)


def of_library(module: str) -> bool:
    """Return whether a Python module belongs to one of the packages."""
    return module.partition(".")[0] in _libraries


def hooks_below(module: nn.Module) -> list[str]:
    """Return the names of a module's submodules with users' forward hooks."""
    found = []
    for name, part in module.named_modules():
        hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if part is not module and any(map(from_outside, hooks)):
            found.append(name)
    return found


def from_outside(hook: Any) -> bool:
    """Return whether a user, not a library, has registered a hook."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return not of_library(home)
