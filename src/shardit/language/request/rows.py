"""Groups of prompts that a language model continues in one batch."""

from __future__ import annotations

from dataclasses import dataclass

from shardit.language.request.sampling_params import SamplingParams


@dataclass(frozen=True)
class Row:
    """A prompt as tokens, its parameters (`max_tokens` is set), and its own seed."""

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int


@dataclass(frozen=True)
class PromptGroup:
    """Rows of one batch. index: the number of the group. seed: of the global generators."""

    index: int
    rows: tuple[Row, ...]
    seed: int = 0
