"""The prompts of one call of `LLM`, and the texts of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardit.language.request.outputs import CompletionOutput, GroupOutput, RequestOutput, RowResult, ended_by_token
from shardit.language.request.rows import PromptRow
from shardit.language.request.text_stream import stop_place


@dataclass(frozen=True)
class PromptBatch:
    """prompts: text (None for a prompt of token ids) and tokens of each. rows: for each requested text, the number of
    its prompt, its number among the texts of that prompt, and its row."""

    tokenizer: Any
    prompts: Sequence[tuple[str | None, tuple[int, ...]]]
    rows: Sequence[tuple[int, int, PromptRow]]

    def decode(self, tokens: Sequence[int], row: PromptRow) -> str:
        """Return the text of tokens, without the changes that some tokenizers make to spaces."""
        return self.tokenizer.decode(
            tokens, skip_special_tokens=row.params.skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def completion(self, number: int, result: RowResult) -> CompletionOutput:
        """Return the completion of row `number`."""
        ids, reason, stop, logprobs = result
        _, copy, row = self.rows[number]
        text = self.decode(ids[:-1] if ended_by_token(reason, stop) else ids, row)
        if isinstance(stop, str):
            least = self.decode(ids[: row.params.min_tokens], row)
            text = text[: stop_place(text, stop, len(least))]
        return CompletionOutput(copy, text, ids, reason, stop, logprobs)

    def outputs(self, results: Sequence[GroupOutput]) -> list[RequestOutput]:
        """Return the outputs of all prompts, in their order. results: of each row, as a group of its own."""
        texts: list[list[CompletionOutput]] = [[] for _ in self.prompts]
        scores: list[list[dict[int, float] | None] | None] = [None for _ in self.prompts]
        for number, result in enumerate(results):
            prompt, _, row = self.rows[number]
            texts[prompt].append(self.completion(number, result.rows[0]))
            if row.params.prompt_logprobs is not None:
                scores[prompt] = [None, *((result.prompt_logprobs[0] if result.prompt_logprobs else None) or ())]
        return [
            RequestOutput(text, ids, tuple(own), found)
            for (text, ids), own, found in zip(self.prompts, texts, scores, strict=True)
        ]
