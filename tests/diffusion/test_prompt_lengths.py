"""Truncated prompts are reported."""

from __future__ import annotations

from shardit.diffusion.run.own_pipeline import own_pipeline
from shardit.diffusion.run.prompt_lengths import is_tokenizer
from tests.support import brought


def test_truncated_prompts_are_reported() -> None:
    pipe = brought.pipeline("flux")
    said: list[str] = []
    own = own_pipeline(pipe, lambda pipe: None, said.append)
    assert is_tokenizer(pipe.tokenizer_2)
    assert not is_tokenizer(pipe.text_encoder)
    assert own.scheduler is not pipe.scheduler
    assert own.transformer is pipe.transformer
    given = {"max_length": 8, "truncation": True, "padding": "max_length"}
    for words in ("a cat", ["a cat", "a dog"]):
        assert own.tokenizer_2(words, **given)["input_ids"] == pipe.tokenizer_2(words, **given)["input_ids"]
    assert said == []
    long = "a cat and a dog and a bird and a fish"
    assert own.tokenizer_2(long, **given)["input_ids"] == pipe.tokenizer_2(long, **given)["input_ids"]
    own.tokenizer_2(long, max_length=8)  # not cut
    (line,) = said
    assert line.startswith("a prompt of ")
    assert line.endswith(" tokens was cut to the first 8: 'a cat and a dog and a bird and a fish' ...")
