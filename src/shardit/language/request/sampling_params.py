"""`SamplingParams`: token sampling and stopping for one prompt."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardit.config import reject_unknown_names
from shardit.errors import InputError
from shardit.language.request.structured_outputs import StructuredOutputsParams, structured_outputs_of
from shardit.params import SEED
from shardit.settings.checks import FLAG, ValueCheck, is_number, matching, number, numbers, text_problem, whole
from shardit.settings.declare import Flag, check_declared, declare, hinted

_STOP = "a non-empty string or a list of those"
_stop = ValueCheck(
    _STOP,
    lambda value: (
        text_problem(value) if value and all(isinstance(one, str) and one for one in _listed(value)) else _STOP
    ),
)

MAX_BIAS = 1e9
"""Largest logit bias: the sum must remain a finite number, also over a small temperature."""

_bias = matching(
    f"numbers by tokens, as in {{13: -100.0}}, within {MAX_BIAS:g}",
    lambda value: (
        isinstance(value, Mapping)
        and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in value)
        and all(is_number(one) and abs(one) <= MAX_BIAS for one in value.values())
    ),
)

_value = functools.partial(declare, flag=None)


def _listed(stop: Any) -> tuple[Any, ...]:
    return (stop,) if not isinstance(stop, (list, tuple)) else tuple(stop)


@hinted("params")
@dataclass(frozen=True)
class SamplingParams:
    """The parameters of one prompt, with vLLM's names. Invalid values raise InputError."""

    n: int = _value(1, "Number of texts for the prompt. With a seed, text i has seed + i.", whole(1))
    temperature: float = declare(1.0, "Divides the logits; 0 always takes the most likely token.", number(0))
    top_p: float = declare(
        1.0, "Sampling from the most likely tokens up to this total probability.", number(above=0, maximum=1)
    )
    top_k: int = declare(0, "Sampling from this many of the most likely tokens; 0 and -1 mean all.", whole(-1))
    min_p: float = declare(
        0.0, "Minimum probability of a token, as a share of that of the most likely token.", number(0, 1)
    )
    repetition_penalty: float = declare(
        1.0,
        "Penalty on tokens of the prompt and of the text so far; values below 1 encourage them.",
        number(1e-6, 1e6),
    )
    presence_penalty: float = declare(0.0, "Subtracted from the logits of tokens in the text so far.", number(-2, 2))
    frequency_penalty: float = declare(
        0.0, "Subtracted from the logits of a token for each occurrence in the text so far.", number(-2, 2)
    )
    seed: int | None = declare(None, "Seed of this prompt's own generator; None and -1 draw one.", SEED)
    stop: str | Sequence[str] | None = declare(
        None, "String that ends the text and is not part of it.", _stop, flag=Flag(each=str, metavar="<text>")
    )
    stop_token_ids: Sequence[int] | None = _value(
        None, "Tokens that end the text, in addition to the model's own end tokens.", numbers(whole(0))
    )
    ignore_eos: bool = declare(False, "Whether to continue after an end token of the model.", FLAG)
    max_tokens: int | None = declare(
        16,
        "Maximum number of tokens; fewer if the prompt leaves less room in the model. None for all the room.",
    )
    min_tokens: int = _value(0, "Minimum number of tokens before an end token or a stop string.", whole(0))
    logprobs: int | None = _value(
        None, "Number of most likely tokens to return with log probabilities for each token.", whole(0)
    )
    prompt_logprobs: int | None = _value(
        None, "Number of most likely tokens to return with log probabilities for each token of the prompt.", whole(0)
    )
    logit_bias: Mapping[int, float] | None = _value(None, "Numbers to add to the logits of tokens.", _bias)
    skip_special_tokens: bool = _value(True, "Whether to omit special tokens from the text.", FLAG)
    structured_outputs: StructuredOutputsParams | None = declare(
        None, "Form that the text must have, such as JSON by a schema; also as a dict.", flag=None
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        reject_unknown_names(cls.__name__, kwargs, [item.name for item in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_declared(self)
        self._check_form()
        if self.max_tokens is not None:
            whole(1)("max_tokens", self.max_tokens)
            if self.min_tokens > self.max_tokens:
                raise InputError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")

    def _check_form(self) -> None:
        if self.structured_outputs is None:
            return
        object.__setattr__(self, "structured_outputs", structured_outputs_of(self.structured_outputs))
        for name, value in (("min_tokens", self.min_tokens), ("ignore_eos", self.ignore_eos)):
            if value:
                raise InputError(
                    f"{name} does not go with structured_outputs, which decides the end of a text; leave it out"
                )

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the strings of `stop`."""
        return () if self.stop is None else _listed(self.stop)
