"""The rounds of a group on a rank: calls of the model, new tokens, rows that join and leave."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit.language.batching.cache_rows import join, keep_rows
from shardit.language.batching.forward import Forward
from shardit.language.batching.prefixes import PrefixStore
from shardit.language.batching.prompt_scores import add_scores, wants_scores
from shardit.language.batching.scheduler import Chunk, Group, Prefill, Scheduler
from shardit.language.batching.sequence import CANCELLED, Sequence

Choose = Callable[[list[Sequence], torch.Tensor], list[int]]
"""Returns the next token of each sequence from the logits of the last position, on every rank."""


@dataclass
class GroupRun:
    """Runs the rounds of a group until it has no members.

    pad: a token for padding. prefixes: keys of earlier texts. choose: see `Choose`. on_tokens: called with the
    sequences that got a token, in each step. pause: lets other groups run. state: what calls of the model hand on, see
    `Forward`.
    """

    forward: Forward
    scheduler: Scheduler
    group: Group
    pad: int
    prefixes: PrefixStore
    choose: Choose
    on_tokens: Callable[[list[Sequence]], None]
    pause: Callable[[], None]
    state: dict[str, Any] = field(default_factory=dict)
    _prefill: Prefill | None = None
    _prefill_state: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> None:
        """Run all rounds."""
        with torch.no_grad():
            while True:
                before = list(self.group.rows)
                step = self.scheduler.next(self.group)
                if step is not None and step.chunk is not None:
                    self._begin(step.chunk.prefill)
                if step is None or step.keep is not None:
                    self._store(before, () if step is None else step.keep or ())
                if step is None:
                    return
                if step.keep is not None:
                    self._keep(step.keep, step.columns)
                if step.decode:
                    self._decode()
                if step.chunk is not None:
                    self._compute(step.chunk)
                self.pause()

    def _begin(self, prefill: Prefill) -> None:
        """Make the cache of a new prefill, at once: its known keys may be forgotten in the next step."""
        if self._prefill is prefill:
            return
        cache = self.forward.new_cache()
        if prefill.known:
            self.prefixes.fill(cache, prefill.sequences[0].tokens, prefill.known)
        self._prefill, self._prefill_state = prefill, {} if cache is None else {"cache": cache}

    def _store(self, rows: list[Sequence], keep: collections.abc.Sequence[int]) -> None:
        """Keep the keys of texts that leave, for prompts that begin alike."""
        for number, one in enumerate(rows):
            if number not in keep and self.prefixes.longest and one.made and one.ended != CANCELLED:
                self.prefixes.add(one.tokens[:-1], self.state["cache"], number)
        if self.scheduler.limits.memory is not None:
            self.prefixes.shrink(self.scheduler.limits.memory - self.scheduler.used)

    def _keep(self, rows: collections.abc.Sequence[int], columns: int) -> None:
        if not rows:
            self.state = {}
        elif self.scheduler.limits.joins:
            keep_rows(self.state["cache"], rows, columns)

    def _decode(self) -> None:
        group = self.group
        if self.scheduler.limits.joins:
            ids = torch.tensor([[one.made[-1]] for one in group.rows])
            logits = self.forward(ids, [one.length for one in group.rows], group.columns, self.state, is_first=False)
        else:
            logits = self.forward.unpadded(_whole(group.rows), self.state, is_first=False)
        self._append_tokens(group.rows, logits)

    def _compute(self, chunk: Chunk) -> None:
        prefill = chunk.prefill
        width, sequences, start, stop = prefill.width, prefill.sequences, chunk.start, chunk.stop
        scores = any(map(wants_scores, sequences))
        if self.scheduler.limits.joins:
            rows = [[self.pad] * (width - one.length) + list(one.tokens) for one in sequences]
            ids = torch.tensor(rows)[:, start:stop]
            lengths = [one.length - (width - stop) for one in sequences]
            logits = self.forward(ids, lengths, stop, self._prefill_state, start == 0, keep=0 if scores else 1)
        else:
            start, stop, ids = 0, width, _whole(sequences)
            logits = self.forward.unpadded(ids, self._prefill_state, is_first=True, keep=0 if scores else 1)
        if scores:
            add_scores(sequences, start, stop, width, logits)
        if chunk.is_last:
            self._join(prefill)
            self._append_tokens(sequences, logits)

    def _join(self, prefill: Prefill) -> None:
        had_rows = bool(self.group.rows)
        self.scheduler.joined(prefill, self.group)
        if had_rows:
            join(self.state["cache"], self._prefill_state["cache"], self.group.columns)
        else:
            self.state = self._prefill_state
        self._prefill, self._prefill_state = None, {}

    def _append_tokens(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        tokens = self.choose(sequences, logits)
        going = [one for one in sequences if one.ended is None]  # others may have been cancelled meanwhile
        for one, token in zip(sequences, tokens, strict=True):
            if one.ended is None or not self.scheduler.limits.joins:  # rows that cannot leave go on
                one.made.append(token)
        self.on_tokens(going)


def _whole(rows: list[Sequence]) -> torch.Tensor:
    return torch.tensor([one.tokens for one in rows])
