"""Folders of tiny language models with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from tests.language import families

TEMPLATE = (
    "{% for one in messages %}{% if loop.index0 and messages[loop.index0 - 1].role == one.role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ one.role }}>{{ one.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

END, TURN = "<end>", "<turn>"
"""The end token of the tokenizer, and one that only the generation configuration names."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and three special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", END, TURN]
    vocabulary = {letter: number for number, letter in enumerate([*specials, *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token=END, additional_special_tokens=[TURN]
    )
    out.chat_template = TEMPLATE
    return out


def write(folder: Path, name: str = "llama", **generation: object) -> Path:
    """Write the folder of a random model; generation: values of its generation configuration."""
    tokens = tokenizer()
    config = families.config_of(name)
    config.vocab_size = len(tokens)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    families.randomize(model)
    model.generation_config = GenerationConfig(pad_token_id=0, **generation)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
