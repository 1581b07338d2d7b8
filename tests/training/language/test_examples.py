"""Which tokens a row becomes, and which of them are labels."""

from __future__ import annotations

from typing import Any

import pytest

from shardit import InputError
from shardit.training.language.examples import Encoder, Example, begin_conversations
from shardit.training.language.rows import TrainingRow
from tests.training.language.tokenizers import (
    BEGIN,
    BEGUN,
    END,
    ENDLESS,
    MARKED,
    MARKED_WITHOUT_END,
    TURN,
    TURNS,
    tokenizer,
)


def chat(*contents: str) -> TrainingRow:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return TrainingRow("a:1", messages=[{"role": roles[n % 2], "content": one} for n, one in enumerate(contents)])


def shown(tokens: Any, example: Example) -> tuple[str, str]:
    """The text of all tokens, and that of the labels with a dot for each other token."""
    texts = [tokens.decode([one]) for one in example.ids.tolist()]
    return "".join(texts), "".join(t if learnt else "." for t, learnt in zip(texts, example.learnt, strict=True))


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("text", ["abc", f"abc{END}", f"abc{END}{END}", f"{BEGIN}abc"])
def test_a_text_has_one_begin_token_and_one_end_token(text: str, begins: bool) -> None:
    tokens = tokenizer(begins=begins)
    (example,) = Encoder(tokens, 100).examples([TrainingRow("a:1", text)])
    begin = BEGIN if begins or text.startswith(BEGIN) else ""
    assert shown(tokens, example) == (f"{begin}abc{END}", f"{begin}abc{END}")
    assert example.labels == len(example.ids) - 1  # nothing predicts the first one


@pytest.mark.parametrize(
    ("template", "all_tokens", "labels"),
    [
        (MARKED, "<s>u:hia:yo</s>u:oka:no</s>", ".......yo</s>......no</s>"),
        (MARKED_WITHOUT_END, "<s>u:hia:yo</s>u:oka:no</s>", ".......yo</s>......no</s>"),
        (BEGUN, "<s>u:hi</s>a:yo</s>u:ok</s>a:no</s>", "<s>u:hi</s>a:yo</s>u:ok</s>a:no</s>"),
        (ENDLESS, "<s>u:hia:you:oka:no</s>", "<s>u:hia:you:oka:no</s>"),
        (BEGIN + BEGUN, "<s>u:hi</s>a:yo</s>u:ok</s>a:no</s>", "<s>u:hi</s>a:yo</s>u:ok</s>a:no</s>"),
    ],
)
def test_answers_are_learnt_with_their_end(template: str, all_tokens: str, labels: str) -> None:
    tokens = tokenizer(template)
    encoder = Encoder(tokens, 100)
    (example,) = encoder.examples([chat("hi", "yo", "ok", "no")])
    assert shown(tokens, example) == (all_tokens, labels)
    assert encoder.counts["ended"] == (template == ENDLESS)
    assert encoder.marks_answers == ("generation" in template)


def test_the_next_turn_is_not_learnt_after_an_end_token() -> None:
    """Two special tokens follow each other: the end of an answer, and the start of a turn."""
    template = MARKED.replace("{{ one.role[0] + ':' }}", TURN)
    tokens = tokenizer(template)
    (example,) = Encoder(tokens, 100).examples([chat("hi", "yo", "ok", "no")])
    assert shown(tokens, example) == (f"<s>{TURN}hi{TURN}yo</s>{TURN}ok{TURN}no</s>", ".....yo</s>....no</s>")


def test_a_template_without_a_begin_token_gets_one_where_texts_have_one() -> None:
    for begins in (True, False):
        tokens = tokenizer(TURNS, begins=begins)
        assert begin_conversations(tokens, chat("hi", "yo")) is begins
        assert begin_conversations(tokens, chat("hi", "yo")) is False  # it has one now
        (example,) = Encoder(tokens, 100).examples([chat("hi", "yo")])
        assert shown(tokens, example)[0] == (BEGIN if begins else "") + "u:hi</s>a:yo</s>"
    assert begin_conversations(tokenizer(BEGUN), chat("hi", "yo")) is False


def test_long_rows_are_cut_and_rows_without_labels_are_left_out() -> None:
    tokens = tokenizer(MARKED)
    encoder = Encoder(tokens, 7)
    rows = [TrainingRow("a:1", "abcdefgh"), TrainingRow("a:2", "abc"), chat("hello", "no"), chat("h", "yes"), chat("a")]
    found = encoder.examples(rows)
    assert [shown(tokens, one) for one in found] == [
        ("<s>abcdef", "<s>abcdef"),  # not at its end, so it has no end token
        ("<s>abc</s>", "<s>abc</s>"),
        ("<s>u:ha:y", "......y"),
    ]
    assert encoder.counts["cut"] == 3
    assert len(encoder.unlearnt) == 2


def test_what_a_template_refuses_is_an_error_with_file_and_line() -> None:
    for template, row, part in (
        ("{{ raise_exception('no system here') }}", chat("a"), "a:1: the chat template refuses"),
        (None, chat("a"), "a:1: the tokenizer has no chat template"),
        (MARKED, TrainingRow("a:1", messages=[{"role": "user"}]), "a:1: messages[0] must have content"),
        (MARKED, TrainingRow("a:1", messages=["hi"]), "a:1: messages[0] must be"),
    ):
        with pytest.raises(InputError) as error:
            Encoder(tokenizer(template), 100).examples([row])
        assert part in str(error.value)
        assert "\n" not in str(error.value)
