"""A sequence: a row of a request while it is generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardit.language.request.rows import PromptRow

if TYPE_CHECKING:
    import torch

    from shardit.language.grammar.token_masks import TokenMask

RowEnd = tuple[str, int | str | None]
"""The finish reason of a row, and the stop string or token that ended it."""


@dataclass(eq=False)
class Sequence:
    """One row of a request. All ranks have the same, except for what only ranks with logits need.

    key: of its request. index: number of the row in the request. arrival: its place in the queue. made: tokens so far.
    ended: set when it has ended or was cancelled; it then leaves its batch before the next step. final: its tokens at
    the end; some models go on with rows that have ended. preemptions: how often its cache was given up. generator,
    mask: for sampling, and the state of its grammar, on ranks with logits. prompt_logprobs: of the tokens of the prompt
    from the second on, as far as they are computed, if they are requested.
    """

    key: int
    index: int
    row: PromptRow
    arrival: int
    made: list[int] = field(default_factory=list)
    ended: RowEnd | None = None
    final: tuple[int, ...] | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    preemptions: int = 0
    generator: torch.Generator | None = field(default=None, repr=False)
    mask: TokenMask | None = field(default=None, repr=False)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the text so far."""
        return len(self.row.prompt) + len(self.made)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt and the text so far."""
        return (*self.row.prompt, *self.made)


CANCELLED: RowEnd = ("cancelled", None)
FAILED: RowEnd = ("failed", None)
