"""`SamplingParams`: how the tokens of one prompt are chosen, and when they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardit.config import reject_unknown_names
from shardit.errors import InputError
from shardit.params import Check, flag, number, numbers, seed_number, whole

_CHECKS: dict[str, Check] = {
    "n": whole(1),
    "temperature": number(0),
    "top_p": number(above=0, maximum=1),
    "top_k": whole(-1),
    "min_p": number(0, 1),
    "repetition_penalty": number(above=0),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "seed": seed_number,
    "stop_token_ids": numbers(whole(0)),
    "ignore_eos": flag,
    "max_tokens": whole(1),
    "min_tokens": whole(0),
    "logprobs": whole(0),
    "skip_special_tokens": flag,
}


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of one prompt, under vLLM's names. Wrong values raise InputError."""

    n: int = 1
    """Texts for the prompt. With a seed, text i has seed + i."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token each time."""
    top_p: float = 1.0
    """The likeliest tokens whose probabilities come to this are kept."""
    top_k: int = 0
    """How many of the likeliest tokens are kept; 0 and -1 keep all."""
    min_p: float = 0.0
    """Tokens are kept whose probability is at least this share of that of the likeliest."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt and of the text so far become this much less likely; below 1, likelier."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the text has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens for each time that the text has them."""
    seed: int | None = None
    """Of this prompt's own generator; None draws one."""
    stop: str | Sequence[str] | None = None
    """Texts that end the text; they are not part of it."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the text, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Whether the text goes on after an end token of the model."""
    max_tokens: int | None = 16
    """Tokens at most; None for as many as the model has room for."""
    min_tokens: int = 0
    """Tokens before an end token or a stop text may come."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told with their logarithmic probabilities for each token, and that of the
    token itself."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        reject_unknown_names(cls.__name__, kwargs, [item.name for item in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, check = getattr(self, item.name), _CHECKS.get(item.name)
            if check is not None and (value is not None or item.default is not None):
                if value is None and item.name == "max_tokens":
                    continue
                check(item.name, value)
        if not all(isinstance(one, str) and one for one in self.stops):
            raise InputError(f"stop must be a text or a list of texts that are not empty, got {self.stop!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
