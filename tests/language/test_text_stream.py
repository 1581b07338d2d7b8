"""Pieces of text contain no partial characters and no part of a stop string, and join to the whole text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from shardit.language.request.text_stream import UNKNOWN, TextStream
from tests.language.folders import tokenizer

TEXT = "a🙂é你 👩‍👩‍👧 \n"


def byte_fallback() -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters; all other characters are tokens of their bytes, as in Llama 2."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "▁": 257, "a": 258, "▁a": 259}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made)


TOKENIZERS = {"byte level": tokenizer(), "byte fallback": byte_fallback()}


def pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int], stops: Sequence[str] = ()) -> list[str]:
    """Return a piece for each token, and the rest."""
    stream = TextStream(decode, stops)
    return [*map(stream.add, ids), stream.end(decode(ids))]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_whole_characters(kind: str) -> None:
    tokens = TOKENIZERS[kind]
    ids = tokens(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(TEXT)
    made = pieces(tokens.decode, ids)
    assert "".join(made) == tokens.decode(ids) == TEXT
    assert UNKNOWN not in "".join(made)
    assert sum(map(bool, made)) == len(TEXT)  # each as soon as it is complete


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens(kind: str, data: st.DataObject) -> None:
    """Bytes that never complete a character are held for a few tokens, and returned at the end. With byte fallback,
    later tokens change the text of earlier ones, so only the length of the returned pieces is checked."""
    tokens = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(3, 258), max_size=24))
    made = pieces(tokens.decode, ids)
    if kind == "byte fallback":
        assert len("".join(made)) >= len(tokens.decode(ids))
        return
    assert "".join(made) == tokens.decode(ids)
    given = [sum(len(piece) for piece in made[: n + 1]) for n in range(len(ids))]
    for n, count in enumerate(given[4:], 4):
        assert count >= len(tokens.decode(ids[: n - 3]).rstrip(UNKNOWN)) - 3


def words(*parts: str) -> Callable[[Sequence[int]], str]:
    return lambda ids: "".join(parts[one] for one in ids)


def test_stop_strings() -> None:
    decode = words("DEF", "G", "HI", "J", "K")
    stream = TextStream(decode, ["DEFGHIJ"])
    assert [stream.add(one) for one in range(4)] == [""] * 4
    assert stream.end("") == ""
    assert pieces(decode, [0, 1, 4], ["DEFGHIJ"]) == ["", "", "DEFGK", ""]
    stream = TextStream(words("ab", "cab", "ca", "b"), ["ab", "ca"], min_tokens=2)
    assert [stream.add(0), stream.add(1), stream.add(2), stream.add(3)] == ["ab", "cab", "", ""]
    stream = TextStream(words("ple", "as"), ["assistant"])
    assert [stream.add(0), stream.add(1), stream.end("pleas")] == ["ple", "", "as"]
    stream = TextStream(words("stop!", "x"), ["stop"])
    assert [stream.add(0), stream.add(1), stream.end("")] == ["", "", ""]
    stream = TextStream(words("a1", "2b", "c"), ["2b", "12"])
    assert [stream.add(0), stream.add(1), stream.add(2), stream.end("a")] == ["a", "", "", ""]
