"""`SamplingParams`: how the tokens of one prompt are chosen, and when they end."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardit.config import reject_unknown_names
from shardit.errors import InputError
from shardit.params import SEED
from shardit.settings.checks import FLAG, Check, number, numbers, text_problem, whole
from shardit.settings.declare import Flag, check_declared, declare

_STOP = "a text or a list of texts that are not empty"
_stop = Check(
    _STOP,
    lambda value: (
        text_problem(value) if value and all(isinstance(one, str) and one for one in _listed(value)) else _STOP
    ),
)

_value = functools.partial(declare, flag=None)


def _listed(stop: Any) -> tuple[Any, ...]:
    return (stop,) if not isinstance(stop, (list, tuple)) else tuple(stop)


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of one prompt, under vLLM's names. Wrong values raise InputError."""

    n: int = _value(1, "Texts for the prompt. With a seed, text i has seed + i.", whole(1))
    temperature: float = declare(1.0, "Divides the logits; 0 takes the likeliest token each time.", number(0))
    top_p: float = declare(
        1.0, "The likeliest tokens whose probabilities come to this are kept.", number(above=0, maximum=1)
    )
    top_k: int = declare(0, "How many of the likeliest tokens are kept; 0 and -1 keep all.", whole(-1))
    min_p: float = declare(
        0.0, "Tokens are kept whose probability is at least this share of that of the likeliest.", number(0, 1)
    )
    repetition_penalty: float = declare(
        1.0,
        "Tokens of the prompt and of the text so far become this much less likely; below 1, likelier.",
        number(above=0),
    )
    presence_penalty: float = declare(0.0, "Subtracted from the logits of tokens that the text has.", number(-2, 2))
    frequency_penalty: float = declare(
        0.0, "Subtracted from the logits of tokens for each time that the text has them.", number(-2, 2)
    )
    seed: int | None = declare(None, "Of this prompt's own generator; None and -1 draw one.", SEED)
    stop: str | Sequence[str] | None = declare(
        None, "Text that ends the text, and is not part of it.", _stop, flag=Flag(each=str, metavar="<text>")
    )
    stop_token_ids: Sequence[int] | None = _value(
        None, "Tokens that end the text, besides the model's own end tokens.", numbers(whole(0))
    )
    ignore_eos: bool = declare(False, "Whether the text goes on after an end token of the model.", FLAG)
    max_tokens: int | None = declare(16, "Tokens at most; None for as many as the model has room for.")
    min_tokens: int = _value(0, "Tokens before an end token or a stop text may come.", whole(0))
    logprobs: int | None = _value(
        None, "For each token, how many of the likeliest tokens come with their logarithmic probabilities.", whole(0)
    )
    skip_special_tokens: bool = _value(True, "Whether special tokens are left out of the text.", FLAG)

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        reject_unknown_names(cls.__name__, kwargs, [item.name for item in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_declared(self)
        if self.max_tokens is not None:
            whole(1)("max_tokens", self.max_tokens)
            if self.min_tokens > self.max_tokens:
                raise InputError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        return () if self.stop is None else _listed(self.stop)
