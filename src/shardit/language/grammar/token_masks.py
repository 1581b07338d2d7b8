"""The tokens that a grammar allows next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from shardit.errors import first_line
from shardit.language.grammar.grammars import grammar_text
from shardit.language.request.structured_outputs import StructuredOutputsParams


class GrammarError(Exception):
    """A grammar allows no token, or became too complex."""


@contextmanager
def _own_failures() -> Iterator[None]:
    """Turn whatever llguidance raises into a GrammarError, as others go on: for a kind of tokenizer that it does not
    know, say. A panic of it is no Exception."""
    try:
        yield
    except (GrammarError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise GrammarError(first_line(error)) from error


class TokenMask:
    """The state of a grammar in one text. It follows from the tokens of the text alone, so a text that was put aside,
    or that other ranks have begun, goes on with a new one. matcher: of llguidance. width: number of logits."""

    def __init__(self, matcher: Any, width: int):
        self._matcher, self._width = matcher, width
        self._count = 0

    def after(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return which tokens may follow those of the text so far, as bools. Raises GrammarError."""
        with _own_failures():
            self._matcher.consume_tokens(list(tokens[self._count :]))
            self._count = len(tokens)
            bits = b"" if self._matcher.is_error() else self._matcher.compute_bitmask()
            if self._matcher.is_error():
                raise GrammarError(self._matcher.get_error())
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=self._width, bitorder="little").astype(bool)
        if not mask.any():
            raise GrammarError("no token is allowed")
        return torch.from_numpy(mask)


class TokenMasks:
    """Makes the masks of texts. tokenizer: of the model. ends: the end tokens of the model, which a grammar allows
    if a text may be complete."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]):
        self._tokenizer, self._ends = tokenizer, sorted(ends)
        self._known: Any = None

    def begin(self, form: StructuredOutputsParams, width: int) -> TokenMask:
        """Return the state of a grammar before the first token. width: number of logits. Raises GrammarError."""
        from llguidance import LLMatcher, LLTokenizer

        with _own_failures():
            if self._known is None:
                size = max(width, len(self._tokenizer))
                tokens = self._tokenizer.backend_tokenizer.to_str()
                self._known = LLTokenizer(tokens, n_vocab=size, eos_token=self._ends)
            return TokenMask(LLMatcher(self._known, grammar_text(form), log_level=0), width)
