"""Generation for a group of prompts: padded on the left, with parameters and stopping criteria for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from shardit.language.request.rows import PromptGroup, Row
from shardit.language.sampling import RowSampler

Decode = Callable[[Sequence[int], bool], str]
"""Returns the text of token ids. Second argument: whether to skip special tokens."""

OnStep = Callable[[int, int, tuple[int | None, ...]], None]
"""Called after each step with its number, the maximum number of steps, and the token that each row's text gets: None
for a row that finished earlier, or with this token."""

RowEnd = tuple[int, str, int | str | None]
"""Number of tokens of a finished row, the reason, and the stop string or token that ended it."""


class RowStoppingCriteria(StoppingCriteria):
    """Ends rows at end tokens, stop strings and maximum lengths. Reads only tokens, which all ranks have.

    ended: the end of each row, None while it is running.
    """

    of_tokens = True

    def __init__(self, rows: Sequence[Row], ends: frozenset[int], prompt_length: int, decode: Decode, on_step: OnStep):
        self.rows, self.ends, self.prompt_length, self.decode = rows, ends, prompt_length, decode
        self.ended: list[RowEnd | None] = [None] * len(rows)
        self._on_step, self._steps = on_step, max(row.params.max_tokens or 1 for row in rows)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return whether each row has ended."""
        made = input_ids[:, self.prompt_length :].tolist()
        shown: list[int | None] = [None] * len(self.rows)
        for number, row in enumerate(self.rows):
            if self.ended[number] is None:
                ended = self.ended[number] = self._end(row, made[number])
                shown[number] = None if ended is not None and ended_by_token(ended) else made[number][-1]
        self._on_step(len(made[0]), self._steps, tuple(shown))
        return torch.tensor([one is not None for one in self.ended], device=input_ids.device)

    def _end(self, row: Row, made: list[int]) -> RowEnd | None:
        params, count, token = row.params, len(made), made[-1]
        if count >= max(params.min_tokens, 1):
            if token in (params.stop_token_ids or ()):
                return count, "stop", token
            if token in self.ends and not params.ignore_eos:
                return count, "stop", None
            text = self.decode(made, params.skip_special_tokens) if params.stops else ""
            found = min(((text.find(stop), stop) for stop in params.stops if stop in text), default=None)
            if found is not None:
                return count, "stop", found[1]
        assert params.max_tokens is not None
        return (count, "length", None) if count >= params.max_tokens else None


def ended_by_token(ended: RowEnd) -> bool:
    """Return whether the last token ended a row, and so is not part of its text."""
    _, reason, stop = ended
    return reason == "stop" and not isinstance(stop, str)


def generate_group(
    model: Any, group: PromptGroup, ends: frozenset[int], pad: int, decode: Decode, on_step: OnStep
) -> list[Any]:
    """Generate all rows of a group. Return for each its token ids, the finish reason, the stop string or token, and
    logprobs on the ranks that have the logits."""
    length = max(len(row.prompt) for row in group.rows)
    ids = torch.tensor([[pad] * (length - len(row.prompt)) + list(row.prompt) for row in group.rows])
    mask = torch.tensor([[0] * (length - len(row.prompt)) + [1] * len(row.prompt) for row in group.rows])
    sampler = RowSampler(group.rows, ends, length)
    criteria = RowStoppingCriteria(group.rows, ends, length, decode, on_step)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max(row.params.max_tokens or 1 for row in group.rows), pad_token_id=pad
    )
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([criteria]),
        disable_compile=True,
    )
    made, found = out[:, length:].tolist(), []
    for number, ended in enumerate(criteria.ended):
        assert ended is not None
        count, reason, stop = ended
        logprobs = sampler.logprobs[number][:count] if sampler.logprobs[number] else None
        found.append((tuple(made[number][:count]), reason, stop, logprobs))
    return found
