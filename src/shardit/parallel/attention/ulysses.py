"""Ulysses: exchanges shards of tokens with all heads for all tokens with a share of the heads, and back.

The algorithm of DeepSpeed-Ulysses (Jacobs et al., 2023), here for shards of any length and any number of heads. Tensors
are [batch, tokens, heads, width]; messages are laid out tokens first, so that data from several ranks forms one tensor
without another copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from shardit.core.comm.collectives import Collectives, even_sizes


class Ulysses:
    """The exchanges of one group of ranks that share the heads of an attention."""

    def __init__(self, comm: Collectives):
        self.comm = comm

    def shares(self, q_heads: int, k_heads: int) -> tuple[list[int], list[int]]:
        """Return the query heads and key heads of each rank; a key head stays with the query heads that use it.

        With fewer heads than ranks some ranks get none.
        """
        k_share = even_sizes(k_heads, self.comm.size)
        return [n * (q_heads // k_heads) for n in k_share], k_share

    def to_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lens: Sequence[int], k_lens: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the local heads of all tokens. q_lens, k_lens: the length of each rank's shard of queries and of
        keys."""
        q_share, k_share = self.shares(q.shape[2], k.shape[2])
        same_width = q.shape[3] == k.shape[3] == v.shape[3]
        if list(q_lens) == list(k_lens) and same_width:  # one message for all three
            q, k, v = self._scatter((q, k, v), (q_share, k_share, k_share), q_lens)
            return q, k, v
        (q,) = self._scatter((q,), (q_share,), q_lens)
        if k.shape[3] == v.shape[3]:
            k, v = self._scatter((k, v), (k_share, k_share), k_lens)
        else:
            (k,), (v,) = self._scatter((k,), (k_share,), k_lens), self._scatter((v,), (k_share,), k_lens)
        return q, k, v

    def to_tokens(self, out: torch.Tensor, q_lens: Sequence[int], share: Sequence[int]) -> torch.Tensor:
        """Invert `to_heads` for the output: return all heads of local tokens, contiguous. share: query heads of each
        rank."""
        me, (batch, _, _, width) = self.comm.index, out.shape
        sends = [piece.contiguous() for piece in out.permute(1, 0, 2, 3).split(list(q_lens))]
        receives = [out.new_empty(q_lens[me], batch, heads, width) for heads in share]
        receives[me] = sends[me]
        self.comm.all_to_all(sends, receives)
        return torch.cat([piece.permute(1, 0, 2, 3) for piece in receives], dim=2)

    def _scatter(
        self, tensors: Sequence[torch.Tensor], shares: Sequence[Sequence[int]], lens: Sequence[int]
    ) -> list[torch.Tensor]:
        """Send every rank its heads of these tensors, as one message; return the local heads of all tokens, as views of
        one buffer."""
        me, first = self.comm.index, tensors[0]
        widths = [sum(share[rank] for share in shares) for rank in range(self.comm.size)]
        full = first.new_empty(sum(lens), first.shape[0], widths[me], first.shape[3])
        receives = list(full.split(list(lens)))
        by_rank = zip(
            *(t.permute(1, 0, 2, 3).split(list(s), 2) for t, s in zip(tensors, shares, strict=True)), strict=True
        )
        sends = []
        for rank, pieces in enumerate(by_rank):
            if rank == me:
                torch.cat(pieces, dim=2, out=receives[me])
                sends.append(receives[me])
            else:
                sends.append(torch.cat(pieces, dim=2))
        self.comm.all_to_all(sends, receives)
        bounds = itertools.accumulate((share[me] for share in shares), initial=0)
        return [full[:, :, low:high].permute(1, 0, 2, 3) for low, high in itertools.pairwise(bounds)]
