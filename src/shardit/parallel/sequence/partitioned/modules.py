"""Intercepts the modules inside a block: their calls go to a handler, which may partition them over the ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from shardit.core.modules.patching import Subclasses, share_subclass

Called = Callable[..., Any]


class ModuleHandler(Protocol):
    """Runs the calls of modules inside a block."""

    def module_call(self, module: nn.Module, call: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of a module."""
        ...


_handler: ContextVar[ModuleHandler | None] = ContextVar("shardit_module_handler", default=None)
_derived: Subclasses = {}


@contextmanager
def modules_go_to(handler: ModuleHandler) -> Iterator[None]:
    """Send calls of intercepted modules in this context to `handler`."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def intercept(block: nn.Module) -> None:
    """Put an interceptor at the modules of a block that multiply by matrices, in place."""
    for part in block.modules():
        done = any(made in type(part).__mro__ for made in _derived.values())
        if part is not block and not done and type(part).forward is not nn.Module.forward and has_matrix(part):
            share_subclass(part, _derived, (), functools.partial(_members, type(part).__call__))


def has_matrix(module: nn.Module) -> bool:
    """Return whether a module or one below it has a parameter of two dimensions or more."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _members(own_call: Any) -> dict[str, Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handler = _handler.get()
        if handler is None:
            return own_call(self, *args, **kwargs)
        return handler.module_call(self, own_call.__get__(self), args, kwargs)

    return {"__call__": __call__}


def only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any, int] | None:
    """Return the leaves of the arguments, their structure and the number of the only tensor; None if there are more or
    none."""
    leaves, spec = tree_flatten((args, kwargs))
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    return (leaves, spec, places[0]) if len(places) == 1 else None
