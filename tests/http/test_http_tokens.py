"""/tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.http_calls import error_of
from tests.support.http_fake import Served
from tests.support.text_fake import END, INFO, LIMIT, ids, served_texts


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_texts(tmp_path_factory.mktemp("texts") / "data") as made:
        yield made


def test_tokens_of_a_text(served: Served) -> None:
    wanted = {"count": 5, "max_model_len": LIMIT, "tokens": ids("abcé")}
    assert served.call("POST", "/tokenize", {"prompt": "abcé"})[:2] == (200, wanted)
    assert served.call("POST", "/detokenize", {"tokens": [*ids("abcé"), END]})[:2] == (200, {"prompt": "abcé<end>"})


def test_tokens_of_a_conversation(served: Served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for more, text in (({}, "<user>hi<assistant>"), ({"add_generation_prompt": False}, "<user>hi")):
        assert served.call("POST", "/tokenize", {"messages": messages, **more})[1]["tokens"] == ids(text)


def test_mistakes(served: Served) -> None:
    both = {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}
    assert "either" in error_of(served, "/tokenize", both, 400)["message"]
    assert "either" in error_of(served, "/tokenize", {}, 400)["message"]
    for token in (-1, INFO.vocabulary):
        error = error_of(served, "/detokenize", {"tokens": [token]}, 400)
        assert error["param"] == "tokens"
    assert error_of(served, "/tokenize", {"prompt": "a", "model": "other"}, 404)
