"""Rows become tokens, of which a loss learns some: begin and end tokens, answers in conversations, cuts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardit.errors import InputError
from shardit.language.request.messages import chat_tokens
from shardit.training.language.rows import TrainingRow

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Example:
    """The tokens of a row. learnt: whether each of them is a label."""

    name: str
    ids: Tensor
    learnt: Tensor

    @property
    def labels(self) -> int:
        """Return the number of labels: the first token has none, since nothing predicts it."""
        return int(self.learnt[1:].sum())


@dataclass
class Encoder:
    """Turns rows into examples with a tokenizer and its chat template.

    ends: further tokens that end an answer, besides those that the tokenizer calls special. counts: of what the user is
    told. unlearnt: names of rows without labels.
    """

    tokenizer: Any
    max_length: int
    ends: frozenset[int] = frozenset()
    counts: Counter[str] = field(default_factory=Counter)
    unlearnt: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        special = (number for number, token in self._added().items() if getattr(token, "special", False))
        own = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        self._special = self.ends | frozenset(own) | frozenset(special)

    def _added(self) -> dict[int, Any]:
        return getattr(self.tokenizer, "added_tokens_decoder", {})

    def examples(self, rows: Iterable[TrainingRow]) -> list[Example]:
        """Return the examples of rows, without those that have no label."""
        found = []
        for row in rows:
            example = self._cut(row.name, *(self._text(row) if row.messages is None else self._chat(row)))
            if example.labels:
                found.append(example)
            else:
                self.unlearnt.append(row.name)
        return found

    def _cut(self, name: str, ids: list[int], learnt: list[bool]) -> Example:
        if len(ids) > self.max_length:
            self.counts["cut"] += 1
        limit = self.max_length
        return Example(name, torch.tensor(ids[:limit], dtype=torch.int32), torch.tensor(learnt[:limit]))

    def _text(self, row: TrainingRow) -> tuple[list[int], list[bool]]:
        """Return the tokens of a text with one end token, all of which are learnt."""
        self.counts["texts"] += 1
        ids, end = list(self.tokenizer(row.text, verbose=False)["input_ids"]), self.tokenizer.eos_token_id
        if end is not None:
            while ids and ids[-1] == end:
                ids.pop()
            ids.append(end)
        ids = self._begun_once(ids)
        return ids, [True] * len(ids)

    def _chat(self, row: TrainingRow) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation; answers are learnt if the template marks them."""
        self.counts["conversations"] += 1
        assert row.messages is not None
        ids = _conversation(self.tokenizer, row)
        learnt = self._answers(row) if self.marks_answers else [True] * len(ids)
        if row.messages[-1].get("role") == "assistant" and not self._ended(ids):
            self.counts["ended"] += 1
            end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            ids, learnt = ids + end, learnt + [True] * len(end)
        start = len(ids) - len(self._begun_once(ids))
        return ids[start:], learnt[start:]

    @property
    def marks_answers(self) -> bool:
        """Whether the chat template marks the tokens of answers."""
        template = self.tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        return any(_MARKED.search(one) for one in texts)

    def _answers(self, row: TrainingRow) -> list[bool]:
        """Return for each token of a conversation whether it is part of an answer, or the end token of one."""
        out = self.tokenizer.apply_chat_template(
            row.messages, tools=row.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, marks = out["input_ids"], [bool(one) for one in out["assistant_masks"]]
        ends = self._special - {self.tokenizer.bos_token_id}
        return [
            mark or (place > 0 and marks[place - 1] and ids[place] in ends and ids[place - 1] not in ends)
            for place, mark in enumerate(marks)
        ]

    def _ended(self, ids: Sequence[int]) -> bool:
        """Return whether a conversation ends in an end token, but for blanks."""
        last = next((one for one in reversed(ids) if self.tokenizer.decode([one]).strip()), None)
        return last in self._special

    def _begun_once(self, ids: list[int]) -> list[int]:
        """Return tokens with one begin token if they start with several."""
        begin, start = self.tokenizer.bos_token_id, 0
        while begin is not None and ids[start : start + 2] == [begin, begin]:
            start += 1
        return ids[start:]


def _conversation(tokenizer: Any, row: TrainingRow) -> list[int]:
    """Return the tokens of a conversation, as a prompt has them. Raises InputError with file and line."""
    try:
        return list(chat_tokens(tokenizer, row.messages or [], None, row.tools, False))
    except InputError as error:
        raise InputError(f"{row.name}: {error}") from error


def begins_texts(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts its begin token before each text."""
    begin = tokenizer.bos_token_id
    return begin is not None and list(tokenizer("a")["input_ids"])[:1] == [begin]


def begin_conversations(tokenizer: Any, row: TrainingRow) -> bool:
    """Make the chat template write the begin token that the tokenizer puts before texts, if it writes none; return
    whether that was so. The template is saved with the result, so that prompts have the token, too."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not begins_texts(tokenizer):
        return False
    if _conversation(tokenizer, row)[:1] == [tokenizer.bos_token_id]:
        return False
    tokenizer.chat_template = "{{- bos_token }}" + template
    return True
