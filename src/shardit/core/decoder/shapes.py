"""Results of a block, known before it has run.

Learned once for calls of a structure, with sizes read off the arguments of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from shardit.core.decoder.stage_tensor import Layout, layout_of
from shardit.errors import UnsupportedError

Dim = int | tuple[int, int]
"""A length, or the number of an argument and that of its dim that is as long."""

Layouts = list[Layout | None] | None
"""Shape and dtype of each leaf that is a new tensor, None for other leaves; None if several sizes are
possible."""

PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class DecoderLeaf:
    """A leaf of a block's result: a new tensor (`dims`: for each dim everything that its length may be), the argument
    number `arg`, or a plain value. order: the dims from the outermost in memory to the innermost."""

    dims: tuple[frozenset[Dim], ...] | None = None
    dtype: torch.dtype | None = None
    order: tuple[int, ...] = ()
    arg: int = -1
    value: Any = None


@dataclass(frozen=True)
class Returned:
    """The result of a block call. writes: the numbers of the arguments that it writes to. calls: how many are known; a
    length that no argument has may be a constant, or that of a cache, which the second call shows."""

    spec: TreeSpec
    leaves: tuple[DecoderLeaf, ...]
    writes: tuple[int, ...] = ()
    calls: int = 1

    def __reduce__(self) -> Any:
        # A specification of pytree warns when it is unpickled: send an example of the result in its place.
        example = tree_unflatten(list(range(len(self.leaves))), self.spec)
        return _returned_as, (example, self.leaves, self.writes, self.calls)

    @functools.cached_property
    def single(self) -> bool:
        """Whether it is one new tensor."""
        return self.spec.is_leaf() and self.leaves[0].dims is not None

    def own_layouts(self) -> Layouts:
        """Return the layouts of new tensors in the call that it describes."""
        sizes = ([next(n for n in dim if isinstance(n, int)) for dim in leaf.dims or ()] for leaf in self.leaves)
        return [
            None if leaf.dims is None else _layout(leaf, size) for leaf, size in zip(self.leaves, sizes, strict=True)
        ]


def _returned_as(example: Any, leaves: tuple[DecoderLeaf, ...], writes: tuple[int, ...], calls: int) -> Returned:
    return Returned(tree_flatten(example)[1], leaves, writes, calls)


def _layout(leaf: DecoderLeaf, size: Sequence[int]) -> Layout:
    assert leaf.dtype is not None
    return torch.Size(size), strides(tuple(size), leaf.order), 0, leaf.dtype


def structure(leaves: Sequence[Any], spec: Any) -> Any:
    """Return the common part of block calls whose results differ only in sizes: plain values, dtypes, and the dims that
    are 1. Whole numbers above 1 count alike: lengths grow with every step."""
    found: list[Any] = [spec]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            found.append((leaf.dtype, *[length == 1 for length in leaf.shape]))
        elif type(leaf) is int and leaf > 1:
            found.append(int)
        else:
            found.append(leaf if isinstance(leaf, PLAIN) else type(leaf))
    return tuple(found)


def describe(name: str, out: Any, arguments: Sequence[Any], writes: tuple[int, ...]) -> Returned:
    """Return the form of a block's result. Raises UnsupportedError if other ranks cannot know it before."""
    leaves, spec = tree_flatten(out)
    return Returned(spec, tuple(_leaf(name, leaf, arguments) for leaf in leaves), writes)


def _leaf(name: str, value: Any, arguments: Sequence[Any]) -> DecoderLeaf:
    if not isinstance(value, PLAIN):
        for number, argument in enumerate(arguments):
            if argument is value:
                return DecoderLeaf(arg=number)
    if isinstance(value, torch.Tensor):
        return DecoderLeaf(tuple(_candidates(length, arguments) for length in value.shape), value.dtype, _order(value))
    if isinstance(value, PLAIN) and not isinstance(value, float):
        return DecoderLeaf(value=value)
    raise UnsupportedError(f"{name} returns a {type(value).__name__}, which other ranks cannot know")


def _candidates(length: int, arguments: Sequence[Any]) -> frozenset[Dim]:
    found: set[Dim] = {length}
    if length != 1:
        for number, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                found.update((number, dim) for dim, other in enumerate(argument.shape) if other == length)
    return frozenset(found)


def without_gaps(out: Any, arguments: Sequence[Any]) -> Any:
    """Return a block's result with dense copies of tensors that have gaps in memory, as slices do; other ranks know
    only the order of the dims. Arguments that it hands back stay as they are."""
    handed_back = {id(argument) for argument in arguments}
    leaves, spec = tree_flatten(out)
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and id(leaf) not in handed_back and not _dense(leaf, order := _order(leaf)):
            size = tuple(leaf.shape)
            dense = torch.empty_strided(size, strides(size, order), dtype=leaf.dtype, device=leaf.device)
            leaves[number] = dense.copy_(leaf)
    return tree_unflatten(leaves, spec)


def narrowed(known: Returned, found: Returned) -> Returned:
    """Return the common part of two calls of a structure. Raises ValueError if they are of different kinds."""

    def kind(leaf: DecoderLeaf) -> Any:
        return leaf if leaf.dims is None else (leaf.dtype, leaf.order, len(leaf.dims))

    same = (known.spec, known.writes) == (found.spec, found.writes)
    if not same or list(map(kind, known.leaves)) != list(map(kind, found.leaves)):
        raise ValueError("what it returns changes from call to call")
    leaves = [
        one
        if one.dims is None or other.dims is None
        else DecoderLeaf(tuple(a & b for a, b in zip(one.dims, other.dims, strict=True)), one.dtype, one.order)
        for one, other in zip(known.leaves, found.leaves, strict=True)
    ]
    return Returned(known.spec, tuple(leaves), known.writes, known.calls + 1)


_ONE = frozenset((1,))


def layouts(returned: Returned, arguments: Sequence[Any]) -> Layouts:
    """Return the layouts of new tensors in a call with these arguments; None if what is known leaves several sizes
    possible."""
    found: list[Layout | None] = []
    for leaf in returned.leaves:
        if leaf.dims is None:
            found.append(None)
            continue
        size = []
        for candidates in leaf.dims:
            if returned.calls == 1 and len(candidates) == 1 and candidates != _ONE:
                return None
            lengths = {one if isinstance(one, int) else arguments[one[0]].shape[one[1]] for one in candidates}
            if len(lengths) != 1:
                return None
            size.append(lengths.pop())
        found.append(_layout(leaf, size))
    return found


def fits(out: Any, writes: tuple[int, ...], known: Returned | None, expected: Layouts) -> bool:
    """Return whether a result is what the other ranks take it for."""
    assert known is not None
    assert expected is not None
    if known.single and type(out) is torch.Tensor and writes == known.writes and layout_of(out) == expected[0]:
        return True  # nearly always
    leaves, spec = tree_flatten(out)
    if (spec, writes) != (known.spec, known.writes):
        return False
    for got, leaf, layout in zip(leaves, known.leaves, expected, strict=True):
        if layout is not None:
            if not isinstance(got, torch.Tensor) or got.shape != layout[0] or not _as_known(got, leaf):
                return False
        elif leaf.arg < 0 and got != leaf.value:
            return False
    return True


def _as_known(tensor: torch.Tensor, leaf: DecoderLeaf) -> bool:
    return tensor.dtype == leaf.dtype and _dense(tensor, leaf.order)


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the dims from the outermost in memory to the innermost; those of length 1 stay next to the dim that
    follows."""
    found = sorted((dim for dim in range(tensor.ndim) if tensor.shape[dim] != 1), key=lambda d: (-tensor.stride(d), d))
    for dim in reversed(range(tensor.ndim)):
        if tensor.shape[dim] == 1:
            found.insert(found.index(dim + 1) if dim + 1 < tensor.ndim else len(found), dim)
    return tuple(found)


def _dense(tensor: torch.Tensor, order: tuple[int, ...]) -> bool:
    """Return whether a tensor has no gaps in memory, and its dims lie in this order. The stride of a dim of length 1
    means nothing."""
    found, expected = tensor.stride(), strides(tuple(tensor.shape), order)
    return not tensor.numel() or all(
        length == 1 or one == other for length, one, other in zip(tensor.shape, found, expected, strict=True)
    )


@functools.lru_cache(1024)
def strides(size: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a dense tensor whose dims lie in memory in this order."""
    found, step = [0] * len(size), 1
    for dim in reversed(order):
        found[dim] = step
        step *= max(size[dim], 1)
    return tuple(found)
