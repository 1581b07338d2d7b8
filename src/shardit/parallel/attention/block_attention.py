"""Runs one call of a block on this rank's tokens and handles its attention calls."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit.errors import RankError, UnsupportedError
from shardit.parallel.attention.hook import intercept_attention
from shardit.parallel.attention.sequence_attention import AttentionLayout, Call, SequenceAttention
from shardit.parallel.dataflow import Dataflow

FAILED, ATTENDING, DONE = 0, 1, 2
"""States that ranks exchange."""

WIDTH = 8
"""Number of values in a rank's state."""


class OutOfStep(Exception):
    """Another rank failed, or did something else: this attempt is over on every rank."""


@dataclass
class BlockAttention:
    """Handles the attention calls of one block call (a `hook.Handler`).

    sharded[n]: whether queries and whether keys of attention call n are sharded; found if `dataflow` is given. layouts:
    of the calls with sharded keys; None = not known for these sizes yet, so ranks exchange their lengths. by_values:
    whether values were read before such a call, on which its lengths may depend; found if `dataflow` is given.
    multiplications: of all calls so far. noisy: whether masks have noise, which hides some tokens if it is a mask.
    """

    attention: SequenceAttention
    sharded: list[tuple[bool, bool]]
    layouts: list[AttentionLayout] | None = None
    dataflow: Dataflow | None = None
    new_layouts: list[AttentionLayout] = field(default_factory=list)
    by_values: bool = False
    multiplications: int = 0
    noisy: bool = False
    _calls: int = 0
    _sharded_calls: int = 0

    def attend(self, call: Call) -> torch.Tensor:
        """See `hook.Handler`."""
        sharded_q, sharded_k = self._is_sharded(call)
        if self.dataflow is None:
            return self._compute(call, sharded_q, sharded_k)
        with self.dataflow.paused():
            out = self._compute(call, sharded_q, sharded_k)
        if sharded_q:
            self.dataflow.mark(out)
        return out

    def _is_sharded(self, call: Call) -> tuple[bool, bool]:
        n = self._calls
        self._calls += 1
        if self.dataflow is not None:
            self.sharded.append(
                (self.dataflow.marked(call.q), self.dataflow.marked(call.k) or self.dataflow.marked(call.v))
            )
        if n >= len(self.sharded):
            raise UnsupportedError("a block calls attention more often than in the first call of its kind")
        return self.sharded[n]

    def _compute(self, call: Call, sharded_q: bool, sharded_k: bool) -> torch.Tensor:
        if not sharded_k:  # every rank has all keys
            self.multiplications += call.multiplications(call.k.shape[1])
            return call.inner(call.q, call.k, call.v, call.mask)
        layout = self._layout(call)
        self.multiplications += call.multiplications(sum(layout.k_lens))
        return (self.attention.attend if sharded_q else self.attention.attend_to_all)(call, layout)

    def _layout(self, call: Call) -> AttentionLayout:
        if self.layouts is not None:
            layout = self.layouts[self._sharded_calls]
            self._sharded_calls += 1
            return layout
        mask = call.mask if isinstance(call.mask, torch.Tensor) else None  # another object is for all tokens
        rows, columns = (1, 1) if mask is None else (mask.shape[-2] if mask.ndim > 1 else 1, mask.shape[-1])
        self.by_values |= self.dataflow is not None and self.dataflow.by_values
        here = [call.q.shape[1], call.k.shape[1], int(mask is not None), rows, columns]
        gathered = exchange_state(self.attention, ATTENDING, *here, other_sizes(call))
        if any(code != ATTENDING for code, *_ in gathered):
            raise OutOfStep
        layout = _layout_of(gathered)
        if layout.valid_tokens and self.noisy:
            self._check_valid_tokens(call, layout)
        self.new_layouts.append(layout)
        return layout

    def _check_valid_tokens(self, call: Call, layout: AttentionLayout) -> None:
        """Raise UnsupportedError, on all ranks, unless the mask hides the keys and the queries of some tokens: only
        then the result of a trial shows that the mask is of that kind."""
        assert call.mask is not None
        plain = call.mask.dtype is torch.bool and call.mask.ndim > 2
        kinds = [code for code, *_ in exchange_state(self.attention, int(plain))]
        if not all(kinds) or bool(self.attention.valid_tokens(call.mask, layout).all()):
            raise UnsupportedError("an attention mask that has neither all rows nor all columns")


def in_step(run: BlockAttention, call: Callable[[], Any], title: str, remedy: str) -> Any:
    """Run a call of a block, whose lengths are not known, and return its result: it fails on all ranks or on none."""
    try:
        try:
            with intercept_attention(run):
                out = call()
        except (OutOfStep, RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            exchange_state(run.attention, FAILED)
            raise
        if any(code != DONE for code, *_ in exchange_state(run.attention, DONE)):
            raise OutOfStep
    except OutOfStep as error:
        text = "fails on another rank, or calls attention there more or less often than here"
        raise UnsupportedError(f"{title} {text}: {remedy}") from error
    return out


def agree(attention: SequenceAttention, values: Sequence[int]) -> list[list[int]]:
    """Gather the values of every rank, in rank order. Collective over "sp"; all ranks give the same number of
    values."""
    mine = torch.tensor([list(values)], dtype=torch.int64, device=attention.sp.group.device)
    return attention.sp.all_gather(mine, [1] * attention.sp.size, 0).tolist()


def exchange_state(attention: SequenceAttention, code: int, *values: int) -> list[list[int]]:
    """Gather a state of every rank and its values, as `agree` does; ranks may be in different states."""
    return agree(attention, [code, *values, *[0] * (WIDTH - 1 - len(values))])


def other_sizes(call: Call) -> int:
    """Return a number for all sizes of an attention call but its lengths, which have to be the same on all ranks; -1 if
    there are not as many keys as values."""
    if call.k.shape[1] != call.v.shape[1]:
        return -1
    sizes: list[object] = [(t.dtype, *t.shape[:1], *t.shape[2:]) for t in (call.q, call.k, call.v)]
    if isinstance(call.mask, torch.Tensor):
        sizes.append((call.mask.dtype, *call.mask.shape[:-2]))
    return zlib.crc32(repr(sizes).encode())


def check_other_sizes(numbers: Collection[int]) -> None:
    """Raise UnsupportedError, on all ranks, if messages would not fit, as the `other_sizes` of the ranks show."""
    if len(set(numbers)) > 1 or -1 in numbers:
        raise UnsupportedError("an attention call whose batch, heads or width is another on some rank")


def _layout_of(gathered: list[list[int]]) -> AttentionLayout:
    _, q_lens, k_lens, masked, rows, columns, others, *_ = (tuple(column) for column in zip(*gathered, strict=True))
    check_other_sizes(others)
    if not masked[0]:
        return AttentionLayout(q_lens, k_lens)
    total = sum(k_lens)
    own_rows = rows == q_lens and set(rows) != {1}
    own_columns = columns == k_lens and set(columns) != {1}
    if not own_columns and set(columns) not in ({1}, {total}):
        raise UnsupportedError(f"an attention mask with {columns} columns on the ranks, over {k_lens} keys")
    both = own_rows and own_columns
    if both and q_lens != k_lens:
        raise UnsupportedError("an attention mask that has neither all rows nor all columns")
    if set(k_lens) == {1} or (set(q_lens) == {1} and set(rows) == {1}):
        raise UnsupportedError(
            "an attention mask over one token per rank; lower ulysses_degree or ring_degree for so short a sequence"
        )
    return AttentionLayout(q_lens, k_lens, own_rows and not both, own_columns and not both, valid_tokens=both)
