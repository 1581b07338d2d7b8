"""Texts and bytes of single tokens, with their log probabilities in the two formats of OpenAI."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardit.language.request.text_stream import UNKNOWN

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The letters that stand for bytes in vocabularies of bytes: printable ones stand for themselves, and those from
    256 on for the others, in their order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


class TokenTexts:
    """Texts of single tokens of a tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """Return the text of a token, whatever is around it."""
        return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def bytes_of(self, token: int) -> list[int]:
        """Return the bytes of a token, also if they are no whole characters."""
        text = self.text(token)
        if UNKNOWN not in text:
            return list(text.encode())
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return [int(found[1], 16)]
        table = _byte_of_letter()
        return [table[letter] for letter in name] if all(letter in table for letter in name) else list(text.encode())

    def entry(self, token: int, values: Mapping[int, float], most: int) -> dict[str, Any]:
        """Return a token with its log probability and those of the `most` likeliest, as in chats."""
        return {**self._shown(token, values[token]), "top_logprobs": [self._shown(*one) for one in _top(values, most)]}

    def _shown(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": max(value, LOWEST), "bytes": self.bytes_of(token)}

    def columns(
        self, pairs: Sequence[tuple[int, Mapping[int, float] | None]], most: int, offset: int
    ) -> tuple[dict[str, Any], int]:
        """Return tokens with their log probabilities (None of a first token) as in completions, and the offset of what
        follows. offset: of the first token in the text; below 0 for one that is not in it."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, values in pairs:
            text = self.text(token)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if values is None else max(values[token], LOWEST))
            top = None if values is None else {self.text(n): max(value, LOWEST) for n, value in _top(values, most)}
            found["top_logprobs"].append(top)
            found["text_offset"].append(max(offset, 0))
            offset += len(text)
        return found, offset


def _top(values: Mapping[int, float], most: int) -> list[tuple[int, float]]:
    return sorted(values.items(), key=lambda one: -one[1])[:most]
