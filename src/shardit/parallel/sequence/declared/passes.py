"""One forward under a declared plan: whole, to record its steps, or over the ranks.

`ReferencePass` and `ShardedPass` have the same methods: for a tensor to split or gather, and for an attention call
(`hook.Handler`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from shardit.errors import UnsupportedError
from shardit.parallel.attention.block_attention import OutOfStep
from shardit.parallel.attention.sequence_attention import Call, SequenceAttention
from shardit.parallel.sequence.declared.attention_steps import (
    AttentionStep,
    GatherStep,
    Seen,
    SplitStep,
    Step,
    learn_attention,
    learn_gather,
    seen_attention,
)
from shardit.parallel.sequence.declared.rules import Rule
from shardit.parallel.sequence.shards.lazy import ShardCache
from shardit.parallel.sequence.shards.token_dims import Split


class PassMismatch(Exception):
    """A forward differs from the one from which its steps were learned."""


@dataclass
class ReferencePass:
    """Splits nothing. events: the recorded steps."""

    events: list[Seen] = field(default_factory=list)

    def split(self, rule: Rule, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor unchanged."""
        self.events.append(Seen(rule.title, (tensor.shape[rule.dim],)))
        return tensor

    def gather(self, rule: Rule, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor unchanged."""
        self.events.append(Seen(rule.title, (tensor.shape[rule.dim],)))
        return tensor

    def attend(self, call: Call) -> torch.Tensor:
        """Plain attention."""
        self.events.append(seen_attention(call))
        return call.inner(call.q, call.k, call.v, call.mask)


@dataclass
class ShardedPass:
    """Runs every rank on its own tokens. steps: the operations in order. whole: while the steps are learned, the events
    of the whole forward (else None). padded: whether the plan pads anything.

    peer_failed: another rank has failed, and all ranks know it.
    """

    attention: SequenceAttention
    steps: list[Step]
    whole: list[Seen] | None = None
    padded: bool = False
    peer_failed: bool = False
    _next: int = 0
    _cache: ShardCache = field(init=False)

    def __post_init__(self) -> None:
        self._cache = ShardCache(self.attention.sp)

    @property
    def blank(self) -> float:
        """Value of padding: zero, or NaN while steps are learned, to show where padding ends up."""
        return 0.0 if self.whole is None else float("nan")

    def split(self, rule: Rule, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard."""
        dim, total = rule.dim % tensor.ndim, tensor.shape[rule.dim]
        seen = Seen(rule.title, (total,))
        if self.whole is not None:
            whole = self._in_whole(seen)
            if whole.sizes != seen.sizes:
                raise UnsupportedError(
                    f"{rule.title} has {total} tokens when it is to be split, but {whole.sizes[0]} in the whole model: "
                    "it is split already, so name only the first place where it appears"
                )
            self.steps.append(SplitStep(seen))
        self._step(seen)
        if rule.pad:
            return self._padded(tensor, dim, total)
        return self._cache.shard_of(tensor, Split(dim, (0,)), (total,), keep=rule.repeated)

    def _padded(self, tensor: torch.Tensor, dim: int, total: int) -> torch.Tensor:
        index, size = self.attention.sp.index, self.attention.sp.size
        length = -(-total // size)
        start = min(index * length, total)
        shard = tensor.narrow(dim, start, min(length, total - start))
        missing = length - shard.shape[dim]
        if not missing:
            return shard.contiguous()
        number = tensor.is_floating_point() or tensor.is_complex()
        return pad(shard, [0, 0] * (tensor.ndim - 1 - dim) + [0, missing], value=self.blank if number else 0)

    def gather(self, rule: Rule, tensor: torch.Tensor) -> torch.Tensor:
        """Return the whole of a tensor that is sharded over the ranks."""
        dim = rule.dim % tensor.ndim
        seen = Seen(rule.title, (tensor.shape[dim],))
        if self.whole is not None:
            with without_modes():
                self.steps.append(self._learned(learn_gather, seen, tensor, dim))
        step = self._step(seen)
        assert isinstance(step, GatherStep)
        return step.run(tensor, dim, self.attention)

    def attend(self, call: Call) -> torch.Tensor:
        """Attend with local queries to the keys of all ranks, or of the tensors that every rank has."""
        seen = seen_attention(call)
        if self.whole is not None:
            with without_modes():
                self.steps.append(self._learned(learn_attention, seen, call))
        step = self._step(seen)
        assert isinstance(step, AttentionStep)
        return step.run(call, self.attention, self.blank)

    def finish(self) -> None:
        """Check at the end of the forward that all steps were run."""
        if self._next != len(self.steps if self.whole is None else self.whole):
            raise PassMismatch(f"{self._next} steps instead of {len(self.steps)}")

    def _learned(self, learn: Callable[..., Step], seen: Seen, *args: Any) -> Step:
        try:
            return learn(seen, self._in_whole(seen), *args, self.attention, self.padded)
        except OutOfStep:
            self.peer_failed = True
            raise

    def _in_whole(self, seen: Seen) -> Seen:
        """Return the same event in the whole forward."""
        assert self.whole is not None
        if self._next >= len(self.whole) or self.whole[self._next].title != seen.title:
            raise UnsupportedError(f"{seen.title} occurs at another place than in the whole model")
        return self.whole[self._next]

    def _step(self, seen: Seen) -> Step:
        n = self._next
        self._next += 1
        if n >= len(self.steps) or self.steps[n].seen != seen:
            known = self.steps[n].seen if n < len(self.steps) else "the end"
            raise PassMismatch(f"{seen} instead of {known}")
        return self.steps[n]


Pass = ReferencePass | ShardedPass
