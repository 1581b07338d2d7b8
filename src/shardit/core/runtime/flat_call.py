"""The arguments of one call, flattened once, and the keys under which calls share a plan."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class FlatCall:
    """One call: its arguments as given, and their leaves and structure before the call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: tuple[Any, ...]
    spec: TreeSpec

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlatCall:
        """Flatten the arguments of a call."""
        leaves, spec = tree_flatten((args, kwargs))
        return FlatCall(args, kwargs, tuple(leaves), spec)

    def again(self) -> FlatCall:
        """Copy the call with lists and dicts of its own: a forward may empty its arguments."""
        args, kwargs = tree_unflatten(list(self.leaves), self.spec)
        return FlatCall(args, kwargs, self.leaves, self.spec)

    def safe(self) -> FlatCall:
        """Return the call with copies of the tensors whose in-place writes torch does not count (those of inference
        mode): the caller may write to them while the call is in flight."""
        if not any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in self.leaves):
            return self
        leaves = [_copied(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return FlatCall(args, kwargs, tuple(leaves), self.spec)

    def signature(self, code: Any) -> tuple[Any, ...]:
        """Return shapes, strides, dtypes and structure of the arguments, values of leaves that are not tensors (except
        floats, which change from step to step), and the modes of torch. `code`: other state on which the computation
        depends, such as training mode."""
        return (*self._described, modes(), code)

    @functools.cached_property
    def _described(self) -> tuple[str, tuple[Any, ...]]:
        return str(self.spec), tuple(map(describe_leaf, self.leaves))

    def mode_key(self, code: Any) -> tuple[Any, ...]:
        """Return the signature without sizes: calls that share it take the same way through the forward, as far as can
        be seen."""
        kinds = [
            (leaf.ndim, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in self.leaves
        ]
        return (str(self.spec), tuple(kinds), modes(), code)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def modes() -> tuple[Any, ...]:
    """Return inference and autocast modes (grad mode does not affect a staged forward: it runs without gradients)."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.is_autocast_enabled(kind)
    return (torch.is_inference_mode_enabled(), torch.get_autocast_dtype(kind) if autocast else None)


def describe_leaf(leaf: Any) -> Any:
    """Return everything of one argument that a plan depends on: of a tensor all but its data."""
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, tuple(leaf.shape), tuple(leaf.stride()), leaf.device.type)
    if isinstance(leaf, (bool, int, str, bytes, type(None), torch.dtype, torch.device)):
        return (type(leaf).__name__, leaf)
    if isinstance(leaf, (numpy.integer, numpy.bool_)):
        return (type(leaf).__name__, leaf.item())
    return type(leaf).__name__
