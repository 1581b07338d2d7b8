"""Outputs of a language model for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


def ended_by_token(reason: str | None, stop: int | str | None) -> bool:
    """Return whether a text ended with a token, which is no part of it. reason, stop: why it ended, as in
    `CompletionOutput`."""
    return reason == "stop" and not isinstance(stop, str)


@dataclass(frozen=True)
class CompletionOutput:
    """One generated text for a prompt.

    token_ids: including the end token, if one ended the text. finish_reason: "stop" (an end token or a stop string) or
    "length". stop_reason: the stop string or token that ended it, None for an end token of the model. logprobs: for
    each token, log probabilities of some tokens by their ids; None if they were not requested.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: Sequence[dict[int, float]] | None = None


@dataclass(frozen=True)
class CompletionChunk:
    """A piece of a text. prompt_index: the number of its prompt. index: that of the text, if a prompt has several.
    token_ids: new since the last chunk. finish_reason, stop_reason: set in the last chunk of a text."""

    prompt_index: int
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The texts for one prompt. prompt: None if token ids were given. prompt_logprobs: for each token of the prompt,
    log probabilities of some tokens by their ids, None for the first token; None if they were not requested."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: Sequence[CompletionOutput] = field(default=())
    prompt_logprobs: Sequence[dict[int, float] | None] | None = None


RowResult = tuple[tuple[int, ...], str, int | str | None, Sequence[dict[int, float]] | None]
"""Token ids of a row, its finish and stop reasons, and logprobs."""


@dataclass(frozen=True)
class GroupOutput:
    """Results of one group of prompts: of each row, token ids, finish and stop reasons, and logprobs. preemptions: how
    often its rows gave up their caches. seconds: since its start. peak_bytes: peak memory of each rank.
    prompt_logprobs: of each row, the log probabilities of the tokens of its prompt from the second on, None if they
    were not requested."""

    rows: Sequence[RowResult] = ()
    preemptions: int = 0
    error: str | None = None
    seconds: float = 0.0
    peak_bytes: Sequence[int] = ()
    prompt_logprobs: Sequence[Sequence[dict[int, float]] | None] = ()
