"""Checks of the first call of a kind: a forward must not depend on things that other ranks do not have."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from shardit.core.runtime.randomness import States, moved
from shardit.errors import UnsupportedError


def refuse_draws(name: str, sizes: Mapping[str, int], before: States, first: States, after: States) -> None:
    """Raise UnsupportedError where a forward draws random numbers that other ranks do not: they run other branches,
    or leave the forward after their last block. `first`: the generators at the first block call."""
    if sizes["cfg"] > 1 and moved(before, after):
        axis, why = "cfg", "each guidance rank runs other branches"
    elif sizes["pp"] > 1 and moved(first, after):
        axis, why = "pipeline", "stages leave it after their last block"
    else:
        return
    raise UnsupportedError(
        f"{name} draws random numbers in its forward, and {why}: call .eval() on it, take away what draws (a hook, "
        f"say), or use {axis}_parallel_size=1"
    )


def refuse_counters(name: str, found: list[list[str]]) -> None:
    """Raise UnsupportedError where a call changes something each time that later calls depend on. found: the names that
    each rank found."""
    names = [one for of_rank in found for one in of_rank]
    if names:
        raise UnsupportedError(
            f"{name} changes {names[0]} in each of its calls, of which stages and guidance ranks run a part: "
            "use pipeline_parallel_size=1 and cfg_parallel_size=1 (slices and spread tokens keep it right)"
        )


VALUES = (torch.Tensor, str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, enum.Enum)
"""What a result may consist of: a later call returns the values of the first one, and the tensors of its own."""


def object_in(out: Any) -> str | None:
    """The class of an object in the result of a forward that may hold state, as a cache does."""
    found = (leaf for leaf in tree_leaves(out) if not isinstance(leaf, VALUES))
    return next((type(leaf).__name__ for leaf in found), None)


def refuse_objects(name: str, out: Any) -> None:
    """Raise UnsupportedError where a forward returns an object: each rank would fill a part of one of its own."""
    found = object_in(out)
    if found is not None:
        raise UnsupportedError(
            f"{name} returns a {found}, of which each rank would fill a part: use pipeline_parallel_size=1 and "
            "cfg_parallel_size=1"
        )


def own_containers(arguments: Any) -> Any:
    """The same arguments in lists and dicts of their own: a forward may empty those that it is given."""
    return tree_map(lambda leaf: leaf, arguments)


def same_bits(expected: Any, got: Any) -> bool:
    """Whether two results have the same structure and their tensors the same bits."""
    a, b = tree_leaves(expected), tree_leaves(got)
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(x: Any, y: Any) -> bool:
    if not isinstance(x, torch.Tensor):
        return not isinstance(y, torch.Tensor)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) if x.ndim else x.equal(y)
