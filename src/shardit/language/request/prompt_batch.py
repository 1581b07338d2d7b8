"""The prompts of one call of `LLM`, and the texts of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardit.language.request.outputs import CompletionOutput, RequestOutput, RowResult, ended_by_token
from shardit.language.request.rows import Row


@dataclass(frozen=True)
class PromptBatch:
    """prompts: text (None for a prompt of token ids) and tokens of each. rows: for each requested text, the number of
    its prompt, its number among the texts of that prompt, and its row."""

    tokenizer: Any
    prompts: Sequence[tuple[str | None, tuple[int, ...]]]
    rows: Sequence[tuple[int, int, Row]]

    def decode(self, tokens: Sequence[int], row: Row) -> str:
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
            text = text[: text.index(stop)]
        return CompletionOutput(copy, text, ids, reason, stop, logprobs)

    def outputs(self, results: Sequence[RowResult]) -> list[RequestOutput]:
        """Return the outputs of all prompts, in their order."""
        found: list[list[CompletionOutput]] = [[] for _ in self.prompts]
        for number, result in enumerate(results):
            found[self.rows[number][0]].append(self.completion(number, result))
        return [RequestOutput(text, ids, tuple(one)) for (text, ids), one in zip(self.prompts, found, strict=True)]
