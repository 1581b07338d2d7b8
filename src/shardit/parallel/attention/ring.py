"""Ring attention: keys and values are passed around the ring; each rank attends to its present block while the next
arrives.

The algorithm of Liu et al., "Ring Attention with Blockwise Transformers" (2023). Tensors are [batch, tokens, heads,
width].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from shardit.core.comm.collectives import Collectives
from shardit.parallel.attention.softmax_merge import Partial, merge, partial_attention


def ring_attention(
    comm: Collectives,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_lens: Sequence[int],
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool = False,
) -> torch.Tensor:
    """Attend with local queries to the keys of all ranks of the ring.

    k_lens: initial number of keys of each rank. mask: its last dimension is 1 or covers the keys of all ranks, in
    order. k and v may have fewer heads than q (grouped queries). causal: a query attends to no key of a later position;
    queries and keys are the same tokens, in the order of the ranks.
    """
    heads, width, v_width = k.shape[2], k.shape[3], v.shape[3]
    block = torch.cat([k.flatten(2), v.flatten(2)], dim=2)
    offsets = [0, *itertools.accumulate(k_lens)]
    total: Partial | None = None
    for step in range(comm.size):
        owner = (comm.index - step) % comm.size
        last = step == comm.size - 1
        coming, wait = block, None
        if not last:
            coming = block.new_empty(block.shape[0], k_lens[(owner - 1) % comm.size], block.shape[2])
            wait = comm.rotate(block, coming)
        if k_lens[owner] and not (causal and owner > comm.index):
            keys = block[..., : heads * width].unflatten(2, (heads, width))
            values = block[..., heads * width :].unflatten(2, (heads, v_width))
            columns = _columns(mask, offsets[owner], k_lens[owner])
            part = partial_attention(
                q, *_repeat(q, keys, values), columns, scale, causal=causal and owner == comm.index
            )
            total = part if total is None else merge(total, part, last)
        if wait is not None:
            wait()
        block = coming
    if total is None:  # as with a causal first rank that has no tokens
        return q.new_empty(*q.shape[:3], v_width)
    return total[0].to(q.dtype)


def _columns(mask: torch.Tensor | None, start: int, length: int) -> torch.Tensor | None:
    return mask if mask is None or mask.shape[-1] == 1 else mask.narrow(-1, start, length)


def _repeat(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    times = q.shape[2] // k.shape[2] if k.shape[2] else 1
    return (k, v) if times == 1 else (k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))
