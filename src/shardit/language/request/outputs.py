"""What a language model gives for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CompletionOutput:
    """One text for a prompt.

    token_ids: with the end token, if one has ended it. finish_reason: "stop" (an end token or a stop text) or "length".
    stop_reason: the stop text or token that ended it, None for an end token of the model. logprobs: for each token the
    logarithmic probabilities of some tokens by their ids, None if they were not asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: Sequence[dict[int, float]] | None = None


@dataclass(frozen=True)
class CompletionChunk:
    """More of a text. prompt_index: the number of its prompt. index: that of the text, where a prompt has several.
    token_ids: those that came since the last chunk. finish_reason, stop_reason: in the last chunk of a text."""

    prompt_index: int
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The texts for one prompt. prompt: None where token ids were given."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: Sequence[CompletionOutput] = field(default=())


RowResult = tuple[tuple[int, ...], str, int | str | None, Sequence[dict[int, float]] | None]
"""The token ids of a row, how it ends, and logprobs."""


@dataclass(frozen=True)
class GroupOutput:
    """What one group of prompts has given: for each row the token ids, how they end, and logprobs. seconds: the time
    from its start. peak_bytes: the most memory that each rank has held."""

    rows: Sequence[RowResult] = ()
    error: str | None = None
    seconds: float = 0.0
    peak_bytes: Sequence[int] = ()
