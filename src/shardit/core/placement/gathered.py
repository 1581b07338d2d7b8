"""Gathers a tensor from the slices that ranks have of it."""

from __future__ import annotations

import torch

from shardit.core.comm.collectives import Collectives
from shardit.core.placement.slices import Shards


def gathered(part: torch.Tensor, cut: Shards, ranks: Collectives) -> torch.Tensor:
    """Gather the whole tensor from the slices of all ranks. Collective."""
    raw = part.view(torch.uint8) if part.dtype.itemsize == 1 else part  # back ends know no float8
    rows = ranks.all_gather(raw, cut.lengths, cut.dim)
    whole = rows.new_empty((*rows.shape[: cut.dim], cut.total, *rows.shape[cut.dim + 1 :]))
    for rank, of_rank in enumerate(rows.split(cut.lengths, cut.dim)):
        for into, piece in cut.of(rank).pairs(whole, of_rank):
            into.copy_(piece)
    return whole.view(part.dtype)
