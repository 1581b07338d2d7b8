"""Sampling of the next token of each sequence, with its own generator, on the ranks that have the logits."""

from __future__ import annotations

import collections.abc

import torch

from shardit.language.batching.sequence import Sequence
from shardit.language.grammar.token_masks import GrammarError, TokenMasks
from shardit.language.request.sampling_params import SamplingParams

OFF = float("-inf")

SHARP = 1e-3
"""Temperatures below take the most likely token, in practice."""

NO_TOKEN = -1
"""Stands for the next token of a sequence whose grammar cannot go on."""


def next_tokens(
    sequences: collections.abc.Sequence[Sequence], logits: torch.Tensor, ends: frozenset[int], masks: TokenMasks | None
) -> torch.Tensor:
    """Return the next token of each sequence, on the CPU, or `NO_TOKEN`. logits: of the last position, (sequences,
    vocabulary). ends: the end tokens of the model. masks: for sequences with a grammar."""
    logits = logits.to(device="cpu", dtype=torch.float32)
    tokens = logits.argmax(-1)
    for number, sequence in enumerate(sequences):
        if _is_plain(sequence):
            continue
        try:
            tokens[number] = _next_token(sequence, logits[number], ends, masks)
        except GrammarError:
            tokens[number] = NO_TOKEN
    return tokens


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Return tokens and log probabilities as float64, (positions, 2, count + 1): of the chosen token, then of the
    `count` most likely ones."""
    likely = torch.log_softmax(logits.to(device="cpu", dtype=torch.float32), -1)
    chosen = torch.cat([tokens[:, None], likely.topk(count).indices], 1)
    return torch.stack([chosen.double(), likely.gather(1, chosen).double()], 1)


def _is_plain(sequence: Sequence) -> bool:
    """Return whether the most likely token is taken from unchanged logits."""
    params = sequence.row.params
    penalized = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    changed = penalized or params.logit_bias or params.structured_outputs is not None
    return params.temperature == 0 and not changed and len(sequence.made) >= params.min_tokens


def _next_token(sequence: Sequence, logits: torch.Tensor, ends: frozenset[int], masks: TokenMasks | None) -> int:
    params = sequence.row.params
    scores = _apply_penalties(sequence, logits)
    if params.structured_outputs is not None and sequence.ended is None:  # some go on in a batch after their end
        assert masks is not None
        sequence.mask = sequence.mask or masks.begin(params.structured_outputs, len(logits))
        scores = scores.masked_fill(~sequence.mask.after(sequence.made), OFF)
    if len(sequence.made) < params.min_tokens:
        unwanted = sorted(one for one in ends | set(params.stop_token_ids or ()) if one < len(scores))
        scores = scores.index_fill(0, torch.tensor(unwanted, dtype=torch.int64), OFF)
    return int(scores.argmax()) if params.temperature == 0 else _sample(sequence, scores)


def _apply_penalties(sequence: Sequence, logits: torch.Tensor) -> torch.Tensor:
    """Return the logits after the bias and the penalties, as defined by transformers and vLLM."""
    params, scores = sequence.row.params, logits
    if params.logit_bias:
        tokens, values = (
            torch.tensor(list(params.logit_bias)),
            torch.tensor([*params.logit_bias.values()], dtype=logits.dtype),
        )
        scores = scores.index_add(0, tokens, values)
    if params.repetition_penalty != 1.0:
        seen = torch.unique(torch.tensor(sequence.tokens))
        picked = scores[seen]
        penalty = params.repetition_penalty
        scores = scores.index_copy(0, seen, torch.where(picked < 0, picked * penalty, picked / penalty))
    if params.presence_penalty or params.frequency_penalty:
        counts = torch.bincount(torch.tensor(sequence.made, dtype=torch.int64), minlength=scores.shape[0])
        scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return scores


def _sample(sequence: Sequence, scores: torch.Tensor) -> int:
    scores = _truncated(sequence.row.params, scores)
    if sequence.generator is None:
        sequence.generator = torch.Generator().manual_seed(sequence.row.seed)
        for _ in sequence.row.made:  # drawn by ranks that have ended since
            torch.empty_like(scores).exponential_(generator=sequence.generator)
    # The argmax of probability / exponential noise is a sample from the distribution.
    noise = torch.empty_like(scores).exponential_(generator=sequence.generator)
    return int((scores.softmax(-1) / noise).argmax())


def _truncated(params: SamplingParams, scores: torch.Tensor) -> torch.Tensor:
    """Return the scores over the temperature, and -inf for tokens that are never sampled."""
    if params.temperature < SHARP:  # the quotient of a large score would be infinite
        scores = scores - scores.max()
    scores = scores / params.temperature
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
    return scores
