"""Intercepts the modules inside a block: their calls go to a handler, which may partition them over the ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.modules.patching import Subclasses, share_subclass

Called = Callable[..., Any]

PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device)
"""Values without a state."""


class ModuleHandler(Protocol):
    """Runs the calls of modules inside a block."""

    def module_call(self, module: nn.Module, call: Called, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of a module."""
        ...


_handler: ContextVar[ModuleHandler | None] = ContextVar("shardit_module_handler", default=None)
_derived: Subclasses = {}


@contextmanager
def intercept_modules(handler: ModuleHandler) -> Iterator[None]:
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


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call, flattened: their leaves, structure, and the numbers of the tensors."""

    leaves: list[Any]
    spec: Any
    places: list[int]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Flatten arguments."""
        leaves, spec = tree_flatten((args, kwargs))
        return cls(leaves, spec, [n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among them."""
        return [self.leaves[n] for n in self.places]

    @property
    def plain(self) -> bool:
        """Whether all else are values without a state that a call may change."""
        return all(n in self.places or leaf is None or isinstance(leaf, PLAIN) for n, leaf in enumerate(self.leaves))

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with other tensors."""
        leaves = list(self.leaves)
        for n, tensor in zip(self.places, tensors, strict=True):
            leaves[n] = tensor
        return tree_unflatten(leaves, self.spec)
