"""Incremental decoding: the text of a stream of tokens, in final pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""The character that tokenizers return for invalid bytes, and for an incomplete character."""

MAX_INCOMPLETE = 3
"""Maximum bytes of an incomplete character."""


def stop_place(text: str, stop: str, least: int = 0) -> int:
    """Return the place of the first occurrence of a stop string that ends after the first `least` characters; -1 if
    there is none."""
    return text.find(stop, max(0, least - len(stop) + 1))


def first_stop(text: str, stops: Sequence[str], least: int = 0) -> tuple[int, str] | None:
    """Return the first place of one of the stop strings, as `stop_place` finds them, and that string."""
    found = ((stop_place(text, stop, least), stop) for stop in stops)
    return min(((place, stop) for place, stop in found if place >= 0), default=None)


class TextStream:
    """Text of one row. decode: returns the text of tokens. stops: stop strings. min_tokens: those whose text no stop
    string ends.

    A piece never ends within a character, nor within text that may become a stop string. Two windows of tokens are
    decoded, as in vLLM, because the text of a token depends on earlier tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), min_tokens: int = 0):
        self._decode, self._stops, self._min_tokens = decode, stops, min_tokens
        self._tokens: list[int] = []
        self._begin = self._sure = 0  # start of the window, and of the tokens in it whose text is not final yet
        self._shown = ""  # text of the window that was returned or is held back
        self._held = ""
        self._given = 0
        self._least = 0  # characters of the text of the first `min_tokens` tokens

    def add(self, token: int) -> str:
        """Add a token and return the text that is final now, often none."""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._begin :])
        run = len(text) - len(text.rstrip(UNKNOWN))
        sure = text[: len(text) - min(run, MAX_INCOMPLETE)]
        # With byte fallback, bytes of an incomplete character change the text of earlier bytes. If they never complete
        # a character, that text stays as it was returned, and only its length is used.
        if sure.startswith(self._shown) or len(self._tokens) - self._sure > MAX_INCOMPLETE + 1:
            self._held += sure[len(self._shown) :]
            self._shown = max(sure, self._shown, key=len)
        if run == 0:
            self._begin, self._sure = self._sure, len(self._tokens)
            self._shown = self._decode(self._tokens[self._begin :])
        if len(self._tokens) <= self._min_tokens:
            self._least = self._given + len(self._held)
        return self._release(len(self._held) - self._possible_stop())

    def end(self, text: str) -> str:
        """Return the rest of the whole text `text`."""
        return text[self._given :]

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self._given += len(piece)
        return piece

    def _possible_stop(self) -> int:
        """Return the length of the suffix of the held text that is a stop string, or may become one."""
        first = first_stop(self._held, self._stops, self._least - self._given)
        found = [] if first is None else [len(self._held) - first[0]]
        for stop in self._stops:
            most = min(len(stop) - 1, len(self._held))
            found.append(next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0))
        return max(found, default=0)
