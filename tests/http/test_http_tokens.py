"""/tokenize and /detokenize."""

from __future__ import annotations

from tests.support.http_calls import error_of
from tests.support.http_fake import Served
from tests.support.text_fake import END, INFO, LIMIT, ids


def test_tokens_of_a_text(texts: Served) -> None:
    wanted = {"count": 5, "max_model_len": LIMIT, "tokens": ids("abcé")}
    assert texts.call("POST", "/tokenize", {"prompt": "abcé"})[:2] == (200, wanted)
    assert texts.call("POST", "/detokenize", {"tokens": [*ids("abcé"), END]})[:2] == (200, {"prompt": "abcé<end>"})


def test_tokens_of_a_conversation(texts: Served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for more, text in (({}, "<user>hi<assistant>"), ({"add_generation_prompt": False}, "<user>hi")):
        assert texts.call("POST", "/tokenize", {"messages": messages, **more})[1]["tokens"] == ids(text)


def test_mistakes(texts: Served) -> None:
    both = {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}
    assert "either" in error_of(texts, "/tokenize", both, 400)["message"]
    assert "either" in error_of(texts, "/tokenize", {}, 400)["message"]
    for token in (-1, INFO.vocabulary):
        error = error_of(texts, "/detokenize", {"tokens": [token]}, 400)
        assert error["param"] == "tokens"
    assert error_of(texts, "/tokenize", {"prompt": "a", "model": "other"}, 404)
