"""Outputs of a language model for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def ended_by_token(reason: str | None, stop: int | str | None) -> bool:
    """Return whether a text ended with a token, which is no part of it. reason, stop: why it ended, as in
    `CompletionOutput`."""
    return reason == "stop" and not isinstance(stop, str)


@dataclass(frozen=True)
class CompletionOutput:
    """One generated text for a prompt."""

    index: int
    """Number of the text among those for its prompt, from 0."""
    text: str
    """The text, without stop string and (as a rule) special tokens."""
    token_ids: tuple[int, ...]
    """Ids of the generated tokens, including the end token if one ended the text."""
    finish_reason: str
    """Reason of the end: "stop" for an end token or a stop string, "length" for the maximum number of tokens."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the text; None for an end token of the model and for "length"."""
    logprobs: Sequence[dict[int, float]] | None = None
    """For each token, log probabilities of some tokens by their ids; None if they were not requested."""


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
    """The texts for one prompt."""

    prompt: str | None
    """The prompt; None if token ids were given."""
    prompt_token_ids: tuple[int, ...]
    """Ids of the tokens of the prompt."""
    outputs: Sequence[CompletionOutput] = ()
    """The texts: `SamplingParams.n` of them."""
    prompt_logprobs: Sequence[dict[int, float] | None] | None = None
    """For each token of the prompt, log probabilities of some tokens by their ids, None for the first token; None if
    they were not requested."""


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
