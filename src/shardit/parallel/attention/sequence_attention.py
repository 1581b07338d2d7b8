"""Attention over tokens that are sharded over ranks: Ulysses inside, Ring outside, or one of them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shardit.core.comm.collectives import Collectives
from shardit.core.comm.mesh import Mesh
from shardit.errors import RankError, UnsupportedError
from shardit.parallel.attention.ring import ring_attention
from shardit.parallel.attention.ulysses import Ulysses

Inner = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""An attention function over whole sequences: q, k, v (BSHD) and a mask of 4 dimensions; returns BSHD."""


class NotInRing(UnsupportedError):
    """Ring cannot merge an attention function that was chosen; another one, or Ulysses, works."""


@dataclass(frozen=True)
class Call:
    """One call of an attention function. q, k, v: [batch, tokens, heads, width], as on this rank.

    mask: up to 4 dimensions that broadcast to [batch, heads, queries, keys]; or an object that the function knows, for
    all queries and keys in their order. inner: the called function, which computes
    attention if all keys are on this rank. not_ring: why Ring, which has kernels of its own, cannot replace it, if so.
    causal: a query attends to the keys up to its own position.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    inner: Inner
    scale: float | None = None
    not_ring: str | None = None
    causal: bool = False

    def multiplications(self, keys: int) -> int:
        """Return the number of multiplications of this call with that many keys."""
        batch, queries, heads, width = self.q.shape
        return batch * queries * heads * keys * (width + self.v.shape[3])


@dataclass(frozen=True)
class AttentionLayout:
    """The sharding of one attention call: tokens of queries and of keys on each rank of "sp", and whether the mask has
    only the rows of local queries or the columns of local keys. valid_tokens: it has both, and is that of a
    self-attention in which a valid token attends to the valid ones: its diagonal shows which tokens are valid."""

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    mask_rows: bool = False
    mask_columns: bool = False
    valid_tokens: bool = False


class SequenceAttention:
    """Attention of one rank of the "sp" axis. Keys of all ranks are ordered by rank, not as in the whole sequence:
    softmax does not depend on their order, and masks are reordered alike."""

    def __init__(self, mesh: Mesh):
        self.sp = Collectives(mesh.axes["sp"])
        self.ulysses = Ulysses(Collectives(mesh.axes["ulysses"])) if "ulysses" in mesh.axes else None
        self.ring = Collectives(mesh.axes["ring"]) if "ring" in mesh.axes else None
        self._in_ring = mesh.coords["ring"]
        self._ulysses_size = mesh.sizes["ulysses"]

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent to others."""
        return self.sp.sent_bytes + sum(c.sent_bytes for c in (self.ring, self.ulysses and self.ulysses.comm) if c)

    def attend(self, call: Call, layout: AttentionLayout) -> torch.Tensor:
        """Attend with local queries to the keys of all ranks. Collective. Raises UnsupportedError if Ring cannot do
        it."""
        if self.ring is not None and call.not_ring is not None:
            raise NotInRing(
                f"ring_degree={self.ring.size} does not work with {call.not_ring}: it merges partial "
                "results of the native attention; use ulysses_degree"
            )
        if self.ring is not None and call.causal and layout.q_lens != layout.k_lens:
            raise UnsupportedError("causal attention over Ring needs as many queries as keys on each rank")
        self._check_lengths(call, layout, layout.q_lens[self.sp.index])
        q, k, v = call.q, call.k, call.v
        q_lens, k_lens = self._of_group(layout.q_lens), self._of_group(layout.k_lens)
        mask = self._whole_mask(call.mask, layout, q_lens) if isinstance(call.mask, torch.Tensor) else call.mask
        q_share: list[int] = []
        if self.ulysses is not None:
            if k.shape[2] < self.ulysses.comm.size and k.shape[2] < q.shape[2]:  # too few key heads for all ranks
                k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
            q_share, _ = self.ulysses.shares(q.shape[2], k.shape[2])
            mask = _own_heads(mask, q.shape[2], q_share, self.ulysses.comm.index)
            q, k, v = self.ulysses.to_heads(q, k, v, q_lens, k_lens)
        if q.shape[2] and self.ring is not None:  # also without queries: the keys of others pass through here
            out = ring_attention(self.ring, q, k, v, self._per_group(layout.k_lens), mask, call.scale, call.causal)
        elif 0 in q.shape:
            out = q.new_empty(*q.shape[:3], v.shape[3])
        else:
            out = call.inner(q, k, v, mask)
        return out if self.ulysses is None else self.ulysses.to_tokens(out, q_lens, q_share)

    def attend_to_all(self, call: Call, layout: AttentionLayout) -> torch.Tensor:
        """Attend with queries that every rank has to the keys of all ranks: keys and values are gathered."""
        self._check_lengths(call, layout, call.q.shape[1])
        k, v = (self.sp.all_gather(t, layout.k_lens, 1) for t in (call.k, call.v))
        mask = call.mask
        if mask is not None and layout.mask_columns:
            mask = _gather_mask(self.sp, mask, layout.k_lens, mask.ndim - 1)
        return call.inner(call.q, k, v, mask)

    def _check_lengths(self, call: Call, layout: AttentionLayout, queries: int) -> None:
        """Raise RankError, which ends all ranks, if the call is not of this layout: others count on its lengths."""
        keys, mask = layout.k_lens[self.sp.index], call.mask
        found, known = [call.q.shape[1], call.k.shape[1], call.v.shape[1]], [queries, keys, keys]
        if isinstance(mask, torch.Tensor):  # rows and columns that the mask of each rank has of its own
            found += mask.shape[-1:] * layout.mask_columns + mask.shape[-2:-1] * layout.mask_rows
            known += [keys] * layout.mask_columns + [queries] * layout.mask_rows
        if found != known:
            text = f"attention has the lengths {found}, but an earlier call of the same shapes had {known}: they "
            text += "follow from what is no argument of a block; set ulysses_degree=1 and ring_degree=1"
            raise RankError(self.sp.group.rank, text)

    def _of_group(self, lens: tuple[int, ...]) -> tuple[int, ...]:
        """Select from lengths per "sp" rank (ulysses varies fastest) those of this rank's ulysses group."""
        start = self._in_ring * self._ulysses_size
        return lens[start : start + self._ulysses_size]

    def _per_group(self, lens: tuple[int, ...]) -> list[int]:
        """Return the sum of lengths per "sp" rank of each ulysses group, in ring order."""
        size = self._ulysses_size
        return [sum(lens[start : start + size]) for start in range(0, len(lens), size)]

    def _before(self, layout: AttentionLayout) -> int:
        """Return the number of queries of earlier ulysses groups."""
        return sum(layout.q_lens[: self._in_ring * self._ulysses_size])

    def valid_tokens(self, mask: torch.Tensor, layout: AttentionLayout) -> torch.Tensor:
        """Return which tokens of all ranks are valid, from this rank's part of a mask of valid tokens. Collective."""
        own = mask.diagonal(dim1=-2, dim2=-1)
        return _gather_mask(self.sp, own, layout.k_lens, own.ndim - 1)

    def _whole_mask(self, mask: torch.Tensor, layout: AttentionLayout, q_lens: tuple[int, ...]) -> torch.Tensor:
        """Gather all columns, and take or gather the rows of all queries of the ulysses group."""
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask
        for dim in (0, 1):  # repeated values need not be sent
            mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 else mask
        if layout.valid_tokens:
            valid = self.valid_tokens(mask, layout)
            rows = valid.narrow(-1, self._before(layout), sum(q_lens))
            return rows.unsqueeze(-1) & valid.unsqueeze(-2)
        if layout.mask_columns:
            mask = _gather_mask(self.sp, mask, layout.k_lens, 3)
        if layout.mask_rows and self.ulysses is not None:
            mask = _gather_mask(self.ulysses.comm, mask, q_lens, 2)
        if self.ring is not None and not layout.mask_rows and mask.shape[2] == sum(layout.q_lens) != 1:
            mask = mask.narrow(2, self._before(layout), sum(q_lens))  # of all rows, which are in the order of the ranks
        return mask


def _gather_mask(comm: Collectives, mask: torch.Tensor, lens: tuple[int, ...], dim: int) -> torch.Tensor:
    if mask.dtype is not torch.bool:
        return comm.all_gather(mask, lens, dim)
    return comm.all_gather(mask.view(torch.uint8), lens, dim).view(torch.bool)


def _own_heads(mask: torch.Tensor | None, heads: int, share: list[int], index: int) -> torch.Tensor | None:
    if mask is None or mask.shape[1] == 1 or mask.shape[1] != heads:
        return mask
    if not isinstance(mask, torch.Tensor):
        raise UnsupportedError(f"a {type(mask).__name__} that differs by head")
    return mask.narrow(1, sum(share[:index]), share[index])
