"""Learns the steps for attention calls and gathers of a forward under a declared plan, by comparing lengths.

The whole forward, run on one rank, gives the number of queries and keys of an attention call. Compared with the lengths
on the ranks: keys as long as the whole are on every rank; keys that add up to the whole are split; and keys that add up
to more have rows that every rank has (text in joint attention). The positions of those rows are found by their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from shardit.errors import UnsupportedError
from shardit.parallel.attention.block_attention import (
    ATTENDING,
    OutOfStep,
    check_other_sizes,
    exchange_state,
    other_sizes,
)
from shardit.parallel.attention.sequence_attention import AttentionLayout, Call, SequenceAttention
from shardit.parallel.sequence.declared.token_rows import Runs, TokenRows, partitioned_rows, runs_of, take

GATHERING = ATTENDING + 10
"""A state of a rank in an exchange (see `block_attention.py`)."""

ALIKE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest relative difference between copies of a token on two ranks; 5e-2 for shorter floats."""


class Seen(NamedTuple):
    """One event of a forward: its title and sizes (of attention: queries, keys, rows and columns of the mask)."""

    title: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class SplitStep:
    """Splits a tensor. seen: as on this rank, compared at every call."""

    seen: Seen


@dataclass(frozen=True)
class GatherStep:
    """Gathers a tensor with `rows` on this rank."""

    seen: Seen
    rows: TokenRows

    def run(self, tensor: torch.Tensor, dim: int, attention: SequenceAttention) -> torch.Tensor:
        """Return the whole tensor."""
        return attention.sp.all_gather(self.rows.take(tensor, dim), self.rows.lens, dim)


@dataclass(frozen=True)
class AttentionStep:
    """Runs an attention call. layout: None if every rank has all keys. rows, columns: this rank's share of the mask,
    None if it is not split; select_rows: the mask has the rows of all queries."""

    seen: Seen
    q: TokenRows
    k: TokenRows
    layout: AttentionLayout | None
    rows: Runs | None = None
    columns: Runs | None = None
    select_rows: bool = False

    def run(self, call: Call, attention: SequenceAttention, blank: float) -> torch.Tensor:
        """Return the output for local queries; `blank` for padding."""
        if self.layout is None and not self.select_rows:
            return call.inner(call.q, call.k, call.v, call.mask)
        mask = call.mask
        if mask is not None and self.rows is not None:
            mask = take(mask, self.rows, mask.ndim - 2)
        if mask is not None and self.columns is not None:
            mask = take(mask, self.columns, mask.ndim - 1)
        k, v = (self.k.take(t, 1) for t in (call.k, call.v))
        if self.q.everywhere:
            assert self.layout is not None
            return attention.attend_to_all(replace(call, k=k, v=v, mask=mask), self.layout)
        own = replace(call, q=self.q.take(call.q, 1), k=k, v=v, mask=mask)
        if self.layout is None:
            out = call.inner(own.q, own.k, own.v, own.mask)
        else:
            out = attention.attend(own, self.layout)
        return self.q.put(out, attention.sp, blank)


Step = SplitStep | GatherStep | AttentionStep


def seen_attention(call: Call) -> Seen:
    """Describe an attention call as an event."""
    mask = call.mask if isinstance(call.mask, torch.Tensor) else None
    rows, columns = (0, 0) if mask is None else (mask.shape[-2] if mask.ndim > 1 else 1, mask.shape[-1])
    return Seen("attention", (call.q.shape[1], call.k.shape[1], rows, columns))


def learn_gather(
    seen: Seen, whole: Seen, tensor: torch.Tensor, dim: int, attention: SequenceAttention, padded: bool
) -> GatherStep:
    """Find the rows of each rank in a gather. Collective over "sp". Raises UnsupportedError if they do not make up the
    whole."""
    real = _real_rows([tensor], dim, padded)
    counts = [codes[1] for codes in _exchange_in_step(attention, [GATHERING, len(real)])]
    total = whole.sizes[0]
    if sum(counts) != total:
        why = "it is not split here" if set(counts) == {total} else "tokens that every rank has must be left out before"
        raise UnsupportedError(f"{seen.title} cannot be gathered: the ranks have {counts} of {total} tokens; {why}")
    return GatherStep(seen, TokenRows(seen.sizes[0], total, tuple(counts), runs_of(real)))


def learn_attention(seen: Seen, whole: Seen, call: Call, attention: SequenceAttention, padded: bool) -> AttentionStep:
    """Find the rows of each rank in an attention call. Collective over "sp". Raises UnsupportedError if lengths do not
    fit."""
    real_q, real_k = _real_rows([call.q], 1, padded), _real_rows([call.k, call.v], 1, padded)
    gathered = _exchange_in_step(attention, [ATTENDING, *seen.sizes, len(real_q), len(real_k), other_sizes(call)])
    check_other_sizes([codes[7] for codes in gathered])
    q_lens, k_lens, rows, columns, q_real, k_real = (
        list(c) for c in zip(*(codes[1:7] for codes in gathered), strict=True)
    )
    q_whole, k_whole, whole_rows, whole_columns = whole.sizes
    k = _rows([call.k, call.v], k_whole, k_lens, k_real, real_k, attention)
    same = (q_whole, q_lens, q_real, real_q) == (k_whole, k_lens, k_real, real_k)
    q = k if same else _rows([call.q], q_whole, q_lens, q_real, real_q, attention)
    own_rows = not q.everywhere and whole_rows > 1 and rows == q_lens
    own_columns = not k.everywhere and whole_columns > 1 and columns == k_lens
    select = not q.everywhere and whole_rows > 1 and not own_rows
    if (select or q.everywhere or whole_rows <= 1) and set(rows) != {whole_rows}:
        raise UnsupportedError(f"an attention mask has {rows} rows on the ranks, over {q_lens} queries")
    if not own_columns and set(columns) != {whole_columns}:
        raise UnsupportedError(f"an attention mask has {columns} columns on the ranks, over {k_lens} keys")
    if own_rows and own_columns:
        raise UnsupportedError("an attention mask is split in its rows and in its columns: split one of them")
    if k.everywhere:
        chosen = runs_of(q.natural(attention.sp.index)) if select else None
        return AttentionStep(seen, q, k, None, chosen, None, select)
    layout = AttentionLayout(q.lens, k.lens, own_rows or select, own_columns)
    mask_rows = q.own if own_rows else runs_of(q.natural(attention.sp.index)) if select else None
    return AttentionStep(seen, q, k, layout, mask_rows, _columns(k, own_columns, whole_columns), select)


def _columns(k: TokenRows, own: bool, whole_columns: int) -> Runs | None:
    """Return this rank's columns of a mask, or all of them in the order in which keys come from the ranks."""
    if own:
        return k.own
    if whole_columns <= 1:
        return None
    order = runs_of([place for rank in range(len(k.lens)) for place in k.natural(rank)])
    return None if len(order) == 1 else order


def _rows(
    tensors: Sequence[torch.Tensor],
    whole: int,
    lens: Sequence[int],
    counts: Sequence[int],
    real: Sequence[int],
    attention: SequenceAttention,
) -> TokenRows:
    """Find the rows of each rank. lens, counts: rows on each rank, and their number without padding. real: indices of
    those on this rank."""
    here, size = lens[attention.sp.index], attention.sp.size
    if set(lens) == {whole} and lens == counts:
        return TokenRows(here, whole, own=((0, here),), everywhere=True)
    shared, rest = divmod(sum(counts) - whole, size - 1)
    if rest or not 0 <= shared <= min(counts):
        why = f" (of {list(lens)}; the other tokens have met padding)" if counts != lens else ""
        raise UnsupportedError(
            f"attention over {whole} tokens cannot be put together from {list(counts)}{why} on the ranks: split each "
            "tensor that is joined to a split one, or leave it whole on all ranks"
        )
    places = _shared_places(tensors, real, shared, attention) if shared else (0, 0)
    return partitioned_rows(here, whole, real, counts, places, attention.sp.index)


def _shared_places(
    tensors: Sequence[torch.Tensor], real: Sequence[int], shared: int, attention: SequenceAttention
) -> tuple[int, int]:
    """Return the number of shared rows at the front and at the back: rows with the same values on every rank."""
    rows = torch.cat([t.flatten(2) for t in tensors], 2)
    front = _alike(take(rows, runs_of(real[:shared]), 1), attention)
    back = _alike(take(rows, runs_of(real[len(real) - shared :]), 1), attention)
    first = next((n for n, same in enumerate(front) if not same), shared)
    last = next((n for n, same in enumerate(reversed(back)) if not same), shared)
    if first == shared and last < shared:
        return shared, 0
    if last == shared and first < shared:
        return 0, shared
    if first + last == shared:
        return first, last
    raise UnsupportedError(
        f"{shared} tokens of an attention call are on every rank, but stand neither before nor after the split ones: "
        "split them, too, or join them at one end"
    )


def _alike(rows: torch.Tensor, attention: SequenceAttention) -> list[bool]:
    """Return for each row (dimension 1) whether it is the same on all ranks."""
    size = attention.sp.size
    of_ranks = attention.sp.all_gather(rows, [rows.shape[1]] * size, 1).unflatten(1, (size, -1)).double()
    first = of_ranks[:, :1]
    apart = (of_ranks - first).norm(dim=(0, 3)).amax(0)
    return (apart <= ALIKE.get(rows.dtype, 5e-2) * first.norm(dim=(0, 3))[0]).tolist()


def _real_rows(tensors: Sequence[torch.Tensor], dim: int, padded: bool) -> list[int]:
    """Return the rows without padding: while steps are learned, padding is NaN."""
    everything = list(range(tensors[0].shape[dim]))
    if not padded or not tensors[0].is_floating_point():
        return everything
    bad = [t.isnan().movedim(dim, 0).flatten(1).any(1) for t in tensors if t.numel()]
    if not bad:
        return everything
    hidden = torch.stack(bad).any(0).tolist()
    return [i for i in everything if not hidden[i]]


def _exchange_in_step(attention: SequenceAttention, values: Sequence[int]) -> list[list[int]]:
    """Gather values of every rank, if all are at the same point."""
    gathered = exchange_state(attention, *values)
    if any(codes[0] != values[0] for codes in gathered):
        raise OutOfStep
    return gathered
