"""The requests of a language model on a rank: their rows as sequences of one scheduler, and their results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shardit.core.comm.collectives import Collectives
from shardit.core.decoder.stage_tensor import StageTensor
from shardit.core.runtime.program import Program
from shardit.core.stages.runtime import Runtime
from shardit.language.batching.forward import Forward
from shardit.language.batching.group_run import GroupRun
from shardit.language.batching.prefixes import PrefixStore, longest_storable
from shardit.language.batching.probe import probe
from shardit.language.batching.prompt_scores import wants_scores
from shardit.language.batching.sampling import NO_TOKEN, log_probabilities, next_tokens
from shardit.language.batching.scheduler import BatchLimits, Group, Scheduler
from shardit.language.batching.sequence import FAILED, Sequence
from shardit.language.batching.stop_conditions import Decode, end_of
from shardit.language.grammar.token_masks import TokenMasks
from shardit.language.request.outputs import GroupOutput, RowResult, ended_by_token
from shardit.language.request.rows import PromptGroup

OnTokens = Callable[[int, int, tuple[int | None, ...], tuple[dict[int, float] | None, ...] | None], None]
"""Called after a step of a request with the tokens of its longest text so far, their maximum, for each row the token
that its text gets (None for a row without a new one), and the log probabilities of each, None if none requested any."""

GRAMMAR_FAILED = (
    "structured_outputs: the grammar became too complex, or no token of the model fits it; use a simpler one, or a "
    "model with an end token and a usual tokenizer"
)

OnEnd = Callable[[int, GroupOutput], None]
"""Called with the key of a request and its result when all of its rows have ended."""


@dataclass
class _Open:
    rows: list[Sequence]
    on_tokens: OnTokens
    maximum: int


@dataclass
class Batcher:
    """Continuous batching on this rank. All ranks of a replica call it alike.

    runtime: None for one rank. ends: end tokens of the model. pad: a token for padding. decode: see `Decode`. masks:
    for texts with a grammar. on_end: see `OnEnd`. on_step: called when all tokens of a step have been reported.
    """

    model: Any
    runtime: Runtime | None
    limits: BatchLimits
    row_bytes: Callable[[int], int]
    ends: frozenset[int]
    pad: int
    decode: Decode
    masks: TokenMasks | None = None
    on_end: OnEnd = lambda key, rows: None
    on_step: Callable[[], None] = lambda: None
    pause: Callable[[], None] = lambda: None
    _open: dict[int, _Open] = field(default_factory=dict)
    _arrivals: int = 0

    def __post_init__(self) -> None:
        self.forward = Forward(self.model)
        able = probe(self.forward, self.pad, self.model.config.get_text_config().vocab_size)
        self.limits = replace(self.limits, joins=able.joins, pads=able.pads, chunks=able.chunks)
        if not able.joins:  # some keep states in modules, and have no room for a second batch
            self.limits = replace(self.limits, groups=1)
        longest = longest_storable(self.forward.new_cache()) if able.joins and able.chunks else 0
        self.prefixes = PrefixStore(self.row_bytes, longest)
        self.scheduler = Scheduler(self.limits, self.row_bytes, self._known)
        axes = {} if self.runtime is None else self.runtime.mesh.axes
        self._neighbours = Collectives(axes["tp"]) if "tp" in axes else None
        self._groups: dict[Program, Group] = {}

    def _known(self, sequence: Sequence) -> int:
        return 0 if wants_scores(sequence) else self.prefixes.length(sequence.tokens)

    def add(self, key: int, request: PromptGroup, on_tokens: OnTokens) -> None:
        """Queue the rows of a request."""
        rows = []
        for index, row in enumerate(request.rows):
            rows.append(Sequence(key, index, row, self._arrivals, list(row.made)))
            self._arrivals += 1
        self._open[key] = _Open(rows, on_tokens, max(row.params.max_tokens or 1 for row in request.rows))
        for one in rows:
            if one.made:  # the ranks that made the last token may have ended before they could report it
                self._note_end(one)
            if one.ended is None:
                self.scheduler.add(one)
        self._end_if_complete(key)

    def cancel(self, key: int) -> bool:
        """Forget a request; its rows leave their batches before the next step. Return whether it was open."""
        self.scheduler.cancel(key)
        return self._open.pop(key, None) is not None

    def program(self) -> Program | None:
        """Return a program that runs a new group, if there is a waiting sequence with room."""
        group = self.scheduler.place()
        if group is None:
            return None
        parts = (self.forward, self.scheduler, group, self.pad, self.prefixes)
        run = GroupRun(*parts, self._choose, self._record, lambda: self.pause())
        program = Program(functools.partial(self._run, run), seed=None)
        self._groups[program] = group
        return program

    def suspects(self, program: Program) -> set[int]:
        """Return the keys of the requests that a program computes: those of prompts, if there are any, as these take
        more memory than the next tokens of texts."""
        group = self._groups.get(program)
        if group is None:
            return set()
        sequences = group.members if group.prefill is None else group.prefill.sequences
        return {one.key for one in sequences}

    def ended(self, program: Program) -> set[int]:
        """Forget the group of a program that has ended. Return the keys of the requests that have failed with it."""
        group = self._groups.pop(program)
        if program.error is None:
            return set()
        if group in self.scheduler.groups:
            self.scheduler.groups.remove(group)
        keys = {one.key for one in group.members if one.key in self._open}
        for key in keys:
            self.cancel(key)
        return keys

    @property
    def is_open(self) -> bool:
        """Whether there are unfinished requests."""
        return bool(self._open)

    @property
    def cache_use(self) -> tuple[int, int | None, int, int]:
        """Return the bytes of all caches and their limit, and since the start how many prompts began with kept keys,
        and their tokens that were not computed again."""
        kept = self.prefixes
        return self.scheduler.used + kept.bytes, self.limits.memory, kept.hits, kept.reused_tokens

    def _run(self, run: GroupRun) -> None:
        with nullcontext() if self.runtime is None else self.runtime.pipeline_call("generate", dict):
            run()

    def _choose(self, sequences: list[Sequence], logits: torch.Tensor) -> list[int]:
        staged = type(logits) is StageTensor
        here = logits.data_here if staged else logits
        tokens = torch.empty(len(sequences), dtype=torch.int64, device="meta")
        if here is not None:
            tokens = next_tokens(sequences, here[:, -1], self.ends, self.masks).to(here.device)
        if staged:
            tokens = logits.exchange.share(tokens, logits.holders)
        if self._neighbours is not None:
            tokens = self._neighbours.of_first(tokens)
        made = tokens.tolist()
        if NO_TOKEN in made:
            self._end_failed([one for one, token in zip(sequences, made, strict=True) if token == NO_TOKEN])
            tokens = tokens.clamp(min=0)
        if any(one.row.params.logprobs is not None for one in sequences):
            self._add_logprobs(sequences, logits, tokens)
        return tokens.tolist()

    def _end_failed(self, sequences: list[Sequence]) -> None:
        """End the requests of sequences whose grammar cannot go on; they leave their batches before the next step."""
        for one in sequences:
            one.ended = FAILED
            if one.key in self._open:
                self.cancel(one.key)
                self.on_end(one.key, GroupOutput(error=GRAMMAR_FAILED))

    def _add_logprobs(self, sequences: list[Sequence], logits: torch.Tensor, tokens: torch.Tensor) -> None:
        wanted = [number for number, one in enumerate(sequences) if one.row.params.logprobs is not None]
        count = max(sequences[number].row.params.logprobs or 0 for number in wanted)
        staged = type(logits) is StageTensor
        here = logits.data_here if staged else logits
        found = torch.empty(len(wanted), 2, count + 1, dtype=torch.float64, device="meta")
        if here is not None:
            found = log_probabilities(here[wanted, -1], tokens[wanted].cpu(), count).to(here.device)
        if staged:
            found = logits.exchange.share(found, logits.holders)
        for number, (ids, values) in zip(wanted, found.tolist(), strict=True):
            most = (sequences[number].row.params.logprobs or 0) + 1
            pairs = list(zip(map(int, ids), values, strict=True))[:most]
            sequences[number].logprobs.append(dict(pairs))

    def _record(self, sequences: list[Sequence]) -> None:
        """Record the new tokens of sequences: report them, and the requests that have ended with them."""
        changed: dict[int, list[Sequence]] = {}
        for one in sequences:
            self._note_end(one)
            changed.setdefault(one.key, []).append(one)
        going = {key: found for key, found in changed.items() if key in self._open}
        for key, found in going.items():
            _report(self._open[key], found)
        self.on_step()
        for key in going:
            self._end_if_complete(key)

    def _note_end(self, one: Sequence) -> None:
        one.ended = end_of(one, self.ends, self.decode)
        one.final = None if one.ended is None else tuple(one.made)

    def _end_if_complete(self, key: int) -> None:
        rows = self._open[key].rows
        if all(one.ended is not None for one in rows):
            del self._open[key]
            scores = [one.prompt_logprobs or None for one in rows]
            preemptions = sum(one.preemptions for one in rows)
            self.on_end(key, GroupOutput([_result(one) for one in rows], preemptions, prompt_logprobs=scores))


def _report(request: _Open, changed: list[Sequence]) -> None:
    count = max(len(one.made) for one in request.rows)
    tokens: list[int | None] = [None] * len(request.rows)
    logprobs: list[dict[int, float] | None] = [None] * len(request.rows)
    for one in changed:
        by_token = one.ended is not None and ended_by_token(*one.ended)
        tokens[one.index] = None if by_token else one.made[-1]
        logprobs[one.index] = one.logprobs[-1] if one.logprobs else None
    request.on_tokens(count, request.maximum, tuple(tokens), tuple(logprobs) if any(logprobs) else None)


def _result(sequence: Sequence) -> RowResult:
    assert sequence.ended is not None
    assert sequence.final is not None
    reason, stop = sequence.ended
    return sequence.final, reason, stop, sequence.logprobs[: len(sequence.final)] or None
