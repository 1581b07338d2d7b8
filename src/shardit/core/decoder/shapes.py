"""What a block returns, known before it has run: learned once for calls of a structure, with sizes read off the call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

Dim = int | tuple[int, int]
"""A length, or the number of an argument and that of its dim that is as long."""


@dataclass(frozen=True)
class Leaf:
    """A leaf of a block's result: a new tensor (`dims`: for each dim everything that its length may be), the argument
    number `arg`, or a plain value. order: the dims from the outermost in memory to the innermost."""

    dims: tuple[frozenset[Dim], ...] | None = None
    dtype: torch.dtype | None = None
    order: tuple[int, ...] = ()
    arg: int = -1
    value: Any = None


@dataclass(frozen=True)
class Returned:
    """The result of a block call. writes: the tensors among its arguments that it writes to."""

    spec: TreeSpec
    leaves: tuple[Leaf, ...]
    writes: tuple[int, ...] = ()

    @functools.cached_property
    def lone(self) -> bool:
        """Whether it is one new tensor."""
        return self.spec.is_leaf() and self.leaves[0].dims is not None and not self.writes


def structure(leaves: Sequence[Any], spec: Any) -> Any:
    """What calls of a block have in common whose results differ in sizes only: plain values, dtypes, and the dims that
    are 1. Whole numbers above 1 count alike: lengths grow with every step."""
    found: list[Any] = [spec]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            found.append((leaf.dtype, *[length == 1 for length in leaf.shape]))
        elif type(leaf) is int and leaf > 1:
            found.append(int)
        elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
            found.append(leaf)
        else:
            found.append(type(leaf))
    return tuple(found)


def leaf_of(value: Any, arguments: Sequence[Any]) -> Leaf | None:
    """The description of a leaf of a result; None for what cannot be known before the block has run."""
    for number, argument in enumerate(arguments):
        if argument is value and value is not None and not isinstance(value, (bool, int, float, str)):
            return Leaf(arg=number)
    if isinstance(value, torch.Tensor):
        order = tuple(sorted(range(value.ndim), key=lambda d: (-value.stride(d), d)))
        dims = tuple(_candidates(length, arguments) for length in value.shape)
        return Leaf(dims, value.dtype, order)
    return Leaf(value=value) if value is None or isinstance(value, (bool, int, str)) else None


def _candidates(length: int, arguments: Sequence[Any]) -> frozenset[Dim]:
    found: set[Dim] = {length}
    if length != 1:
        for number, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                found.update((number, dim) for dim, other in enumerate(argument.shape) if other == length)
    return frozenset(found)


def narrowed(known: Returned, found: Returned) -> Returned:
    """What two calls of a structure have in common. Raises ValueError if they are of different kinds."""
    if known.spec != found.spec or known.writes != found.writes:
        raise ValueError("it returns other values than before")
    leaves = []
    for one, other in zip(known.leaves, found.leaves, strict=True):
        if one.dims is None or other.dims is None:
            if one != other:
                raise ValueError("it returns other values than before")
            leaves.append(one)
            continue
        if (one.dtype, one.order, len(one.dims)) != (other.dtype, other.order, len(other.dims)):
            raise ValueError("it returns another kind of tensor than before")
        leaves.append(Leaf(tuple(a & b for a, b in zip(one.dims, other.dims, strict=True)), one.dtype, one.order))
    return Returned(known.spec, tuple(leaves), known.writes)


def sizes(returned: Returned, arguments: Sequence[Any]) -> list[tuple[int, ...] | None] | None:
    """The size of each new tensor among the leaves; None where what is known leaves several possible."""
    found: list[tuple[int, ...] | None] = []
    for leaf in returned.leaves:
        if leaf.dims is None:
            found.append(None)
            continue
        size = []
        for candidates in leaf.dims:
            lengths = {one if isinstance(one, int) else arguments[one[0]].shape[one[1]] for one in candidates}
            if len(lengths) != 1:
                return None
            size.append(lengths.pop())
        found.append(tuple(size))
    return found


def strides(size: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a dense tensor whose dims lie in memory in this order."""
    found, step = [0] * len(size), 1
    for dim in reversed(order):
        found[dim] = step
        step *= max(size[dim], 1)
    return tuple(found)
