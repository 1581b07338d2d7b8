"""The text of tokens that come one by one, in pieces that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""How tokenizers decode bytes that are no character, or not a whole one yet."""

UNSURE = 3
"""So many bytes of a character can be there without the last one."""


class TextStream:
    """Text of one row. decode: the text of tokens. stops: texts that end it.

    A piece never ends within a character, nor within text that may turn out to be a stop text. The method with two
    windows of tokens is that of vLLM: what a token adds depends on those before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._decode, self._stops = decode, stops
        self._tokens: list[int] = []
        self._begin = self._sure = 0  # of the window; of the tokens in it whose text is not sure yet
        self._shown = ""  # text of the window that was given or is held back
        self._held = ""
        self._given = 0

    def add(self, token: int) -> str:
        """A token; the text that is sure now, often none."""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._begin :])
        run = len(text) - len(text.rstrip(UNKNOWN))
        sure = text[: len(text) - min(run, UNSURE)]
        # With byte fallback, bytes that are no whole character yet change the text of those before them; if they never
        # become one, that text stays as it was given, and counts by its length.
        if sure.startswith(self._shown) or len(self._tokens) - self._sure > UNSURE + 1:
            self._held += sure[len(self._shown) :]
            self._shown = max(sure, self._shown, key=len)
        if run == 0:
            self._begin, self._sure = self._sure, len(self._tokens)
            self._shown = self._decode(self._tokens[self._begin :])
        return self._give(len(self._held) - self._possible_stop())

    def end(self, text: str) -> str:
        """The rest, given the whole text."""
        return text[self._given :]

    def _give(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self._given += len(piece)
        return piece

    def _possible_stop(self) -> int:
        """The length of the end of the held text that is a stop text, or may become one."""
        found = [len(self._held) - at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        for stop in self._stops:
            most = min(len(stop) - 1, len(self._held))
            found.append(next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0))
        return max(found, default=0)
