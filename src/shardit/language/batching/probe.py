"""Finds out what a model allows in a batch, by a few calls with a handful of tokens.

Padding on the left changes the text of some models in transformers itself, states of linear attention may not continue
in chunks, and caches of unknown classes cannot be joined. Such models get batches of rows of one length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from shardit.core.decoder.stage_tensor import materialized
from shardit.errors import RankError
from shardit.language.batching.cache_rows import join
from shardit.language.batching.forward import Forward

LONG, SHORT = 7, 4
"""Tokens of the two prompts."""

CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Maximum relative distance of logits, 0.05 for short number formats: rounding gives about 1e-6 and 0.01, a wrong
position about 1 in a trained model."""


@dataclass(frozen=True)
class Abilities:
    """joins: whether rows of different lengths can join and leave a batch, and be computed again. pads, chunks: whether
    prompts of different lengths can be computed together, and one in several chunks."""

    joins: bool
    pads: bool
    chunks: bool


@torch.no_grad()
def probe(forward: Forward, pad: int, vocabulary: int) -> Abilities:
    """Return what a model allows. Collective."""
    if not forward.joins:
        return Abilities(False, False, False)
    calls = _Calls(forward, pad, vocabulary)
    alone = [calls.attempt(lambda one=one: calls.steps([one], (len(one),))) for one in calls.prompts]
    if alone[0] is None or alone[1] is None or not calls.agree(calls.recomputed, [alone[0][1]]):
        return Abilities(False, False, False)  # such as models that are not causal
    expected = [torch.cat([long, short]) for long, short in zip(*alone, strict=True)]
    if not calls.agree(calls.joined, expected[1:]):
        return Abilities(False, False, False)
    return Abilities(
        joins=True,
        pads=calls.agree(lambda: calls.steps(calls.prompts, (LONG,)), expected),
        chunks=forward.masks_windows and calls.agree(lambda: calls.steps([calls.prompts[0]], (SHORT, LONG)), alone[0]),
    )


class _Calls:
    def __init__(self, forward: Forward, pad: int, vocabulary: int):
        self.forward, self.pad = forward, pad
        self.prompts = [[(31 * k + 7 * length) % vocabulary for k in range(length)] for length in (LONG, SHORT)]
        self.following = [(113 + length) % vocabulary for length in (LONG, SHORT)]

    def prefill(self, prompts: list[list[int]], stops: tuple[int, ...]) -> tuple[dict[str, Any], torch.Tensor]:
        width, state, start, logits = max(map(len, prompts)), {"cache": self.forward.new_cache()}, 0, torch.empty(0)
        ids = torch.tensor([[self.pad] * (width - len(one)) + one for one in prompts])
        for stop in stops:
            lengths = [len(one) - (width - stop) for one in prompts]
            logits = self.forward(ids[:, start:stop], lengths, stop, state, is_first=start == 0)
            start = stop
        return state, materialized(logits)[:, -1].float()

    def step(self, state: dict[str, Any], prompts: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor([[self.following[self.prompts.index(one)]] for one in prompts])
        width = max(map(len, prompts)) + 1
        logits = self.forward(ids, [len(one) + 1 for one in prompts], width, state, is_first=False)
        return materialized(logits)[:, -1].float()

    def steps(self, prompts: list[list[int]], stops: tuple[int, ...]) -> list[torch.Tensor]:
        """Return the logits after a prefill up to each of `stops`, and after one more token."""
        state, logits = self.prefill(prompts, stops)
        return [logits, self.step(state, prompts)]

    def joined(self) -> list[torch.Tensor]:
        """Return the logits of both prompts after a token that they get together, each computed alone before."""
        (long, _), (short, _) = (self.prefill([one], (len(one),)) for one in self.prompts)
        join(long["cache"], short["cache"], LONG)
        return [self.step(long, self.prompts)]

    def recomputed(self) -> list[torch.Tensor]:
        """Return the logits after the long prompt and one more token, computed at once."""
        _, logits = self.prefill([[*self.prompts[0], self.following[0]]], (LONG + 1,))
        return [logits]

    def agree(self, make: Callable[[], list[torch.Tensor]], expected: list[torch.Tensor]) -> bool:
        """Return whether logits can be made, and are those expected."""
        made, close = self.attempt(make), CLOSE.get(self.forward.model.dtype, 0.05)
        if made is None:
            return False
        return all(bool((a - b).norm() <= close * b.norm()) for a, b in zip(made, expected, strict=True))

    def attempt(self, make: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor] | None:
        """Return logits; None if the model refuses the call."""
        try:
            return make()
        except RankError:
            raise
        except Exception:
            return None
