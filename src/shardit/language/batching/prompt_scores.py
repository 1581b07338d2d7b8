"""Log probabilities of the tokens of prompts, from the logits of their columns."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass

import torch

from shardit.core.decoder.stage_tensor import StageTensor
from shardit.language.batching.sampling import log_probabilities
from shardit.language.batching.sequence import Sequence

AT_ONCE = 64
"""Columns whose logits are copied at once; all of a chunk may take as much memory as the weights."""


def wants_scores(sequence: Sequence) -> bool:
    """Return whether log probabilities of the prompt of a sequence are requested and not complete."""
    count = sequence.row.params.prompt_logprobs
    return count is not None and len(sequence.prompt_logprobs) < len(sequence.row.prompt) - 1


@dataclass(frozen=True)
class _Span:
    """Columns `start` to `stop` of a chunk in row number `row`, and the tokens of the prompt that follow each."""

    sequence: Sequence
    row: int
    start: int
    stop: int
    tokens: tuple[int, ...]


def add_scores(sequences: list[Sequence], start: int, stop: int, width: int, logits: torch.Tensor) -> None:
    """Record the log probabilities of prompts in sequences that want them, on every rank, after columns `start` to
    `stop` have been computed. width: columns of the prefill, in which all sequences end. logits: of these columns."""
    spans = [
        _span(number, one, start, stop, width - one.length) for number, one in enumerate(sequences) if wants_scores(one)
    ]
    spans = [one for one in spans if one.tokens]
    if not spans:
        return
    count = max(one.sequence.row.params.prompt_logprobs or 0 for one in spans)
    staged = type(logits) is StageTensor
    here = logits.data_here if staged else logits
    found = torch.empty(sum(len(one.tokens) for one in spans), 2, count + 1, dtype=torch.float64, device="meta")
    if here is not None:
        found = torch.cat([_scores(one, here, count) for one in spans]).to(here.device)
    if staged:
        found = logits.exchange.share(found, logits.holders)
    values = iter(found.tolist())
    for one in spans:
        most = (one.sequence.row.params.prompt_logprobs or 0) + 1
        for _ in one.tokens:
            tokens, likely = next(values)
            pairs = list(zip(map(int, tokens), likely, strict=True))[:most]
            one.sequence.prompt_logprobs.append(dict(pairs))


def _span(number: int, sequence: Sequence, start: int, stop: int, padding: int) -> _Span:
    prompt, known = sequence.row.prompt, len(sequence.prompt_logprobs)
    first, last = max(start, padding + known), min(stop, padding + len(prompt) - 1)
    tokens = prompt[first + 1 - padding : last + 1 - padding] if first < last else ()
    return _Span(sequence, number, first - start, last - start, tokens)


def _scores(span: _Span, logits: torch.Tensor, count: int) -> torch.Tensor:
    tokens, columns = torch.tensor(span.tokens), logits[span.row, span.start : span.stop]
    parts: collections.abc.Iterable[tuple[torch.Tensor, torch.Tensor]] = zip(
        tokens.split(AT_ONCE), columns.split(AT_ONCE), strict=True
    )
    return torch.cat([log_probabilities(part, own, count) for own, part in parts])
