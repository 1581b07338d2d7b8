"""The end of a text: end tokens, stop strings, the maximum length."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable

from shardit.language.batching.sequence import RowEnd, Sequence
from shardit.language.request.text_stream import first_stop

Decode = Callable[[collections.abc.Sequence[int], bool], str]
"""Returns the text of token ids. Second argument: whether to skip special tokens."""


def end_of(sequence: Sequence, ends: frozenset[int], decode: Decode) -> RowEnd | None:
    """Return how a sequence ends with its last token; None if it goes on. ends: the end tokens of the model."""
    params, made = sequence.row.params, sequence.made
    if len(made) >= max(params.min_tokens, 1):
        token = made[-1]
        if token in (params.stop_token_ids or ()):
            return "stop", token
        if token in ends and not params.ignore_eos:
            return "stop", None
        if params.stops:
            text, least = (decode(some, params.skip_special_tokens) for some in (made, made[: params.min_tokens]))
            if (found := first_stop(text, params.stops, len(least))) is not None:
                return "stop", found[1]
    assert params.max_tokens is not None
    return ("length", None) if len(made) >= params.max_tokens else None
