"""Pieces of tensors in the files of a checkpoint: whole ones, or the slices of tensor ranks with their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardit.core.placement.slices import Shards, Slice

Contents = Sequence[dict[str, Any]]
"""The contents of the files of a checkpoint."""

Place = dict[str, Any]
"""Where a slice lies in its whole tensor: `dim`, `total` and the `segments` of `core/placement/slices.py`."""


def place_of(cut: Shards, rank: int) -> Place:
    """Return the place of the slice of a rank."""
    return {"dim": cut.dim, "total": cut.total, "segments": [list(segment) for segment in cut.ranks[rank]]}


def pieces_of(contents: Contents, kind: str, name: str) -> list[tuple[Any, Place | None]]:
    """Return the entries of one kind for a parameter, each with its place; None: it is whole."""
    return [(one[kind][name], one.get("places", {}).get(name)) for one in contents if name in one[kind]]


def own_part(pieces: Sequence[tuple[torch.Tensor, Place | None]], cut: Shards | None, rank: int) -> torch.Tensor:
    """Return a rank's part of a tensor that was written in pieces, of whatever number; all of it without a cut."""
    own = None if cut is None else place_of(cut, rank)
    for tensor, place in pieces:
        if place == own:
            return tensor
    whole, place = pieces[0]
    if place is not None:
        shape = list(whole.shape)
        shape[place["dim"]] = place["total"]
        whole = whole.new_empty(shape)
        for tensor, found in pieces:
            for into, piece in _slice(found or place).pairs(whole, tensor):
                into.copy_(piece)
    fits = cut is not None and whole.ndim > cut.dim and whole.shape[cut.dim] == cut.total
    return cut.of(rank).take(whole) if cut is not None and fits else whole


def _slice(place: Place) -> Slice:
    return Slice(place["dim"], tuple((start, length) for start, length in place["segments"]))
