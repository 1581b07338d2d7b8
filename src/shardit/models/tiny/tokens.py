"""Real tokenizers made offline: byte-level BPE for Qwen and CLIP, unigram for T5."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardit.models.tiny.words import (
    CHAT_TEMPLATES,
    CLIP_SPECIALS,
    QWEN_SPECIALS,
    T5_SPECIALS,
    VOCAB,
    corpus,
    shapes_words,
    words,
)


def build_tokenizer(style: str, chat: str | None = None) -> Any:
    """Return the transformers tokenizer of a style ("qwen", "clip", "t5", "shapes"), with the named chat template."""
    tokenizer = _STYLES[style]()
    if len(tokenizer) > VOCAB:
        raise AssertionError(f"the {style} tokenizer has {len(tokenizer)} ids, more than the {VOCAB} embedding rows")
    if chat is not None:
        tokenizer.chat_template = CHAT_TEMPLATES[chat]
    return tokenizer


def save_tokenizer(folder: Path, style: str, chat: str | None = None) -> None:
    """Writes the tokenizer's files; Qwen and CLIP checkpoints also carry vocab.json and merges.txt."""
    tokenizer = build_tokenizer(style, chat)
    tokenizer.save_pretrained(str(folder))
    if style in ("t5", "shapes"):
        return
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _qwen() -> Any:
    from transformers import Qwen2Tokenizer

    vocab, merges = _train_bpe(Qwen2Tokenizer().backend_tokenizer, QWEN_SPECIALS, suffix="")
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        additional_special_tokens=list(QWEN_SPECIALS[1:8]),
        model_max_length=4096,
    )


def _clip() -> Any:
    from transformers import CLIPTokenizer

    vocab, merges = _train_bpe(CLIPTokenizer().backend_tokenizer, CLIP_SPECIALS, suffix="</w>")
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _t5() -> Any:
    return _unigram(words())


def _shapes() -> Any:
    return _unigram(shapes_words())


def _unigram(known: list[str]) -> Any:
    import transformers

    tokenizer_class: Any = transformers.T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]
    characters = [chr(code) for code in range(33, 127)] + sorted(set("äöüßéèàçñ"))
    pieces = [(token, 0.0) for token in T5_SPECIALS]
    pieces += [("▁", -4.0), *((f"▁{word}", -6.0 - len(word) / 16) for word in known)]
    pieces += [(character, -9.0) for character in characters]
    return tokenizer_class(vocab=pieces, extra_ids=0, model_max_length=512)


def _train_bpe(blank: Any, specials: tuple[str, ...], suffix: str) -> tuple[dict[str, int], Any]:
    """Vocabulary and merges: the specials, all bytes, then what BPE learns from the corpus cut by `blank`."""
    from tokenizers import pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + suffix for letter in alphabet] if suffix else []
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 300,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix=suffix,
        special_tokens=endings,  # else they are numbered in hash order, and ties between merges fall differently
    )
    blank.train_from_iterator(corpus(), trainer=trainer)
    merges = [tuple(pair) for pair in json.loads(blank.to_str())["model"]["merges"]]
    tokens = [*specials, *alphabet, *endings, *("".join(pair) for pair in merges)]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


_STYLES: dict[str, Callable[[], Any]] = {"qwen": _qwen, "clip": _clip, "t5": _t5, "shapes": _shapes}
