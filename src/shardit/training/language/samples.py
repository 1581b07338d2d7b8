"""Greedy continuations of prompts by a model that may be cut into stages."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad

from shardit.training.language.batches import padded_length

TOKENS = 64
"""The most tokens of a continuation."""


def continuation(model: nn.Module, ids: Sequence[int], ends: Collection[int], most: int = TOKENS) -> list[int]:
    """Return the tokens that a model takes for the likeliest after `ids`, up to an end token, which is one of them.

    Collective over the stages. There is no cache: calls have few lengths, so that most take a known course.
    """
    device = next(one.device for one in model.parameters() if not one.is_meta)
    forward: Any = model
    tokens = list(ids)
    with torch.no_grad():
        while len(tokens) < len(ids) + most and (len(tokens) == len(ids) or tokens[-1] not in ends):
            given = pad(torch.tensor([tokens], device=device), (0, padded_length(len(tokens)) - len(tokens)))
            logits = forward(input_ids=given, use_cache=False).logits
            tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[len(ids) :]


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Turn dropout off for a while; afterwards each module has its own mode again."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def write_samples(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], ends: Collection[int], chat: bool, folder: Path
) -> list[Path]:
    """Write the continuation of each prompt to a file of its own; return the files. Collective over the stages; the
    first rank of all writes. chat: prompts are questions for the chat template."""
    texts = []
    with evaluated(model):
        for prompt in prompts:
            made = continuation(model, prompt_tokens(tokenizer, prompt, chat), ends)
            texts.append(tokenizer.decode(made, skip_special_tokens=True))
    files = [folder / f"{number}.txt" for number in range(len(texts))]
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for file, prompt, text in zip(files, prompts, texts, strict=True):
            file.write_text(f"{prompt}\n\n{text}\n", encoding="utf-8")
    return files


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Return the tokens of a prompt: as the beginning of a text, or as a question with the start of an answer."""
    if not chat:
        ids, end = list(tokenizer(prompt)["input_ids"]), tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids
    question = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(question, tokenize=True, add_generation_prompt=True, return_dict=False))
