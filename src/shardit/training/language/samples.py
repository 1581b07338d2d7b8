"""Greedy continuations of prompts by a model that may be cut into stages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad

from shardit.errors import InputError
from shardit.language.request.messages import chat_tokens
from shardit.training.language.batches import padded_length

TOKENS = 64
"""The most tokens of a continuation."""


def continuation(
    model: nn.Module, ids: Sequence[int], ends: Collection[int], most: int = TOKENS, room: int | None = None
) -> list[int]:
    """Return the tokens that a model takes for the likeliest after `ids`, up to an end token, which is one of them.

    room: the most tokens that the model takes. Collective over the stages. There is no cache; calls have few lengths,
    so most follow a known plan.
    """
    device = next(one.device for one in model.parameters() if not one.is_meta)
    forward: Any = model
    tokens, limit = list(ids), min(len(ids) + most, room or len(ids) + most)
    with torch.no_grad():
        while len(tokens) < limit and (len(tokens) == len(ids) or tokens[-1] not in ends):
            width = min(padded_length(len(tokens)), room or padded_length(len(tokens)))
            given = pad(torch.tensor([tokens], device=device), (0, width - len(tokens)))
            logits = forward(input_ids=given, use_cache=False).logits
            tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[len(ids) :]


@dataclass(frozen=True)
class Writer:
    """Writes samples. ends: tokens at which a text ends. room: the most tokens that the model takes, if there is a
    limit."""

    tokenizer: Any
    ends: Collection[int]
    room: int | None

    def write(self, model: nn.Module, prompts: Sequence[tuple[str, Sequence[int]]], folder: Path) -> list[Path]:
        """Write the continuation of each prompt to a file of its own; return the files. Collective over the stages; the
        first rank of all writes. prompts: texts with their tokens."""
        texts = []
        for _, ids in prompts:
            made = continuation(model, ids, self.ends, room=self.room)
            texts.append(self.tokenizer.decode(made, skip_special_tokens=True))
        files = [folder / f"{number}.txt" for number in range(len(texts))]
        if not dist.is_initialized() or dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for file, (prompt, _), text in zip(files, prompts, texts, strict=True):
                file.write_text(f"{prompt}\n\n{text}\n", encoding="utf-8")
        return files


def prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Return the tokens of a prompt: as the beginning of a text, or as a question with the start of an answer. Raises
    InputError for a prompt without tokens."""
    if not chat:
        ids, end = list(tokenizer(prompt)["input_ids"]), tokenizer.eos_token_id
        ids = ids[:-1] if ids[-1:] == [end] else ids
        if not ids:
            raise InputError(f"sample_prompts: {prompt!r} has no tokens: give it a text")
        return ids
    return chat_tokens(tokenizer, [{"role": "user", "content": prompt}], None, None, True)
