"""Splits a batched transformer call by sample into micro-batches, and merges their results."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from shardit.core.runtime.flat_call import FlatCall
from shardit.core.runtime.pending import PendingSource, PendingTensor

CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest relative L2 difference between a batch run whole and run by sample."""


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the samples in a call: the first dimension of its first tensor, or the length of its first list of
    tensors."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, torch.Tensor):
            return value.shape[0] if value.ndim > 1 else 1
        if isinstance(value, list) and value and all(isinstance(v, torch.Tensor) for v in value):
            return len(value)
    return 1


def split(call: FlatCall, count: int) -> list[FlatCall]:
    """Return the calls of `count` micro-batches, of nearly equal size and in order.

    Arguments with one entry per sample (a tensor's first dimension, or a list) are cut; all others go to every
    micro-batch.
    """
    batch = batch_size(call.args, call.kwargs)
    bounds = [batch * i // count for i in range(count + 1)]
    return [
        FlatCall.of(
            tuple(_cut(value, batch, low, high) for value in call.args),
            {name: _cut(value, batch, low, high) for name, value in call.kwargs.items()},
        )
        for low, high in itertools.pairwise(bounds)
    ]


def pattern(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, ...]:
    """Return which arguments `split` would cut: sizes that happen to equal the batch size make another pattern."""
    batch = batch_size(args, kwargs)
    return tuple(_has_samples(leaf, batch) for leaf in _leaves(args, kwargs, batch))


def samples_differ(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a batch has samples that are not equal: only these show whether a model relates samples."""
    batch = batch_size(args, kwargs)
    samples = [list(leaf) for leaf in _leaves(args, kwargs, batch) if _has_samples(leaf, batch)]
    tensors = ([one for one in each if isinstance(one, torch.Tensor)] for each in samples)
    return any(not torch.equal(one, first) for first, *others in filter(None, tensors) for one in others)


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> list[Any]:
    """Return the arguments of a call, lists with one entry per sample as one."""
    return tree_flatten((args, kwargs), is_leaf=lambda value: type(value) is list and len(value) == batch)[0]


def _has_samples(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, list) or (isinstance(leaf, torch.Tensor) and leaf.shape[:1] == (batch,))


def _cut(value: Any, batch: int, low: int, high: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[low:high] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, list):
        if len(value) == batch:
            return value[low:high]
        return [_cut(v, batch, low, high) for v in value]
    if isinstance(value, tuple):
        return tuple(_cut(v, batch, low, high) for v in value)
    if isinstance(value, dict):
        return {k: _cut(v, batch, low, high) for k, v in value.items()}
    return value


def merge(outs: list[Any]) -> Any:
    """Merge the results of the micro-batches: tensors are concatenated, lists of tensors are joined.

    Results still on the wire stay pending. Raises ValueError if the results do not fit together.
    """
    flat = [_lists_as_leaves(out) for out in outs]
    if len({(len(leaves), spec) for leaves, spec in flat}) > 1:
        raise ValueError("micro-batches give results of different structure")
    merged = [_merge_leaf([leaves[i] for leaves, _ in flat]) for i in range(len(flat[0][0]))]
    return tree_unflatten(merged, flat[0][1])


def _lists_as_leaves(out: Any) -> tuple[list[Any], Any]:
    return tree_flatten(out, is_leaf=lambda v: type(v) is list)


def _merge_leaf(pieces: list[Any]) -> Any:
    if isinstance(pieces[0], list):
        return [item for piece in pieces for item in piece]
    if not isinstance(pieces[0], torch.Tensor):
        return pieces[0]
    if pieces[0].ndim == 0:
        raise ValueError("a result has no sample dimension")
    samples = sum(piece.shape[0] for piece in pieces)
    buffer = torch.empty((samples, *pieces[0].shape[1:]), dtype=pieces[0].dtype, device=pieces[0].device)

    def fill() -> None:
        with torch.no_grad():
            for piece, part in zip(pieces, buffer.split([p.shape[0] for p in pieces]), strict=True):
                part.copy_(piece)  # waits for the piece

    if not any(isinstance(piece, PendingTensor) for piece in pieces):
        fill()
        return buffer
    return PendingSource(fill).wrap(buffer)


def close(whole: Any, merged: Any) -> bool:
    """Return whether a batch run by sample has the same result as when run whole, up to rounding."""
    a, b = tree_leaves(whole), tree_leaves(merged)
    return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))


def _close(x: Any, y: Any) -> bool:
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    difference = (x.double() - y.double()).norm()
    return bool(difference <= CLOSE.get(x.dtype, 0.0) * x.double().norm())
