"""Prompts as the ranks get them."""

from __future__ import annotations

from dataclasses import dataclass

from shardit.language.request.sampling_params import SamplingParams


@dataclass(frozen=True)
class PromptRow:
    """A prompt as tokens, its parameters (`max_tokens` is set), and its own seed. made: tokens of the text that are
    known already, because ranks that have ended since have made them; the ranks continue after them."""

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    made: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptGroup:
    """The rows of one request."""

    rows: tuple[PromptRow, ...]
