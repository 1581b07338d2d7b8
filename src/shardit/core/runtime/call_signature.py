"""What two calls must have in common to share a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves


def signature(arguments: Any, code: Any) -> tuple[Any, ...]:
    """Shapes, strides, dtypes and structure of the arguments, values of what is not a tensor (but not of floats, which
    change from step to step), and the modes that torch runs under. `code`: what else decides how the model computes, as
    training mode does."""
    leaves, spec = tree_flatten(arguments)
    return (str(spec), tuple(describe_leaf(leaf) for leaf in leaves), modes(), code)


def mode_key(arguments: Any, code: Any) -> tuple[Any, ...]:
    """The signature without sizes: calls that share it take the same way through the forward, as far as can be seen."""
    leaves, spec = tree_flatten(arguments)
    kinds = tuple((leaf.ndim, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in leaves)
    return (str(spec), kinds, modes(), code)


def asks_for_gradients(arguments: Any) -> bool:
    """Whether a call is to be differentiated with respect to its arguments."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(arguments))


def modes() -> tuple[Any, ...]:
    """Inference and autocast modes (grad mode does not change what a staged forward does: it runs without)."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.is_autocast_enabled(kind)
    return (torch.is_inference_mode_enabled(), torch.get_autocast_dtype(kind) if autocast else None)


def describe_leaf(leaf: Any) -> Any:
    """What a plan depends on of one argument: of a tensor all but its data."""
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, tuple(leaf.shape), tuple(leaf.stride()), leaf.device.type)
    if isinstance(leaf, (bool, int, str, bytes, type(None), torch.dtype, torch.device)):
        return (type(leaf).__name__, leaf)
    return type(leaf).__name__
