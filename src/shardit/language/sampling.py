"""Sampling of the next token of each row, with its own generator, on the ranks that have the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from shardit.core.decoder.stage_tensor import mapped
from shardit.language.request.rows import Row

OFF = float("-inf")


class RowSampler(LogitsProcessor):
    """A logits processor for `generate` that masks all but one token of each row.

    ends: the end tokens of the model. logprobs: the requested log probabilities of each row for each step.
    """

    def __init__(self, rows: Sequence[Row], ends: frozenset[int], prompt_length: int):
        self.rows, self.ends, self.prompt_length = rows, ends, prompt_length
        self.logprobs: list[list[dict[int, float]]] = [[] for _ in rows]
        self._generators = [torch.Generator().manual_seed(row.seed) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores of -inf, except for the chosen token of each row."""
        return mapped(lambda logits: self._choose_tokens(input_ids, logits), scores)

    def _choose_tokens(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(logits, OFF)
        for number, row in enumerate(self.rows):
            made = input_ids[number, self.prompt_length :]
            token = self._next_token(number, row, made, logits[number].float().cpu())
            out[number, token] = 0.0
        return out

    def _next_token(self, number: int, row: Row, made: torch.Tensor, logits: torch.Tensor) -> int:
        params = row.params
        likely = torch.log_softmax(logits, -1) if params.logprobs is not None else None
        scores = self._apply_penalties(row, made.cpu(), logits)
        if len(made) < params.min_tokens:
            ends = sorted(self.ends | set(params.stop_token_ids or ()))
            scores = scores.index_fill(0, torch.tensor(ends, dtype=torch.int64), OFF)
        token = int(scores.argmax()) if params.temperature == 0 else self._sample(number, row, scores)
        if likely is not None:
            best = likely.topk(params.logprobs or 0).indices.tolist()
            self.logprobs[number].append({one: float(likely[one]) for one in dict.fromkeys([token, *best])})
        return token

    def _apply_penalties(self, row: Row, made: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits after the penalties, as defined by transformers and vLLM."""
        params, scores = row.params, logits
        if params.repetition_penalty != 1.0:
            seen = torch.unique(torch.cat([torch.tensor(row.prompt), made]))
            picked = scores[seen]
            penalty = params.repetition_penalty
            scores = scores.index_copy(0, seen, torch.where(picked < 0, picked * penalty, picked / penalty))
        if params.presence_penalty or params.frequency_penalty:
            counts = torch.bincount(made, minlength=scores.shape[0]).to(scores.dtype)
            scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        return scores

    def _sample(self, number: int, row: Row, scores: torch.Tensor) -> int:
        params, scores = row.params, scores / row.params.temperature
        if params.top_k > 0:
            scores = scores.masked_fill(scores < scores.topk(min(params.top_k, len(scores))).values[-1], OFF)
        if params.min_p > 0:
            probabilities = scores.softmax(-1)
            scores = scores.masked_fill(probabilities < params.min_p * probabilities.max(), OFF)
        if params.top_p < 1:
            ordered, order = scores.sort(descending=False)
            dropped = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
            dropped[-1] = False
            scores = scores.index_fill(0, order[dropped], OFF)
        # The argmax of probability / exponential noise is a sample from the distribution.
        noise = torch.empty_like(scores).exponential_(generator=self._generators[number])
        return int((scores.softmax(-1) / noise).argmax())
