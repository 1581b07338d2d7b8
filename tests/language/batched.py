"""Rows that a rank continues in batches, without processes of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from shardit import SamplingParams
from shardit.core.runtime.program import Program
from shardit.core.runtime.request_loop import RequestLoop, Schedule
from shardit.core.stages.runtime import Runtime
from shardit.language.batching.batcher import Batcher
from shardit.language.batching.scheduler import BatchLimits
from shardit.language.request.outputs import GroupOutput, RowResult
from shardit.language.request.rows import PromptGroup, PromptRow


def batcher_of(model: Any, runtime: Runtime | None = None, **limits: Any) -> Batcher:
    """Return a batcher in whose memory each column of a row takes one byte."""
    wanted = BatchLimits(**{"rows": 32, "tokens": 512, **limits})
    return Batcher(model, runtime, wanted, lambda columns: columns, frozenset(), 0, lambda *_: "")


def outputs(batcher: Batcher, rows: Sequence[PromptRow], runtime: Runtime | None = None) -> list[GroupOutput]:
    """Run rows, each as a request, and return their outputs."""
    found: dict[int, GroupOutput] = {}
    batcher.on_end = lambda key, output: found.update({key: output})
    loop = RequestLoop(Schedule(0)) if runtime is None else runtime.loop
    batcher.pause = loop.yield_turn
    for key, row in enumerate(rows):
        batcher.add(key, PromptGroup((row,)), lambda *_: None)

    def enter(active: int) -> Program | None:
        return batcher.program()

    for program in loop.rounds(enter, lambda active: active > 0 or batcher.is_open):
        batcher.ended(program)
        if program.error is not None:
            raise program.error
    return [found[key] for key in range(len(rows))]


def run(batcher: Batcher, rows: Sequence[PromptRow], runtime: Runtime | None = None) -> list[RowResult]:
    """Run rows, each as a request, and return their results."""
    return [output.rows[0] for output in outputs(batcher, rows, runtime)]


def reuses(batcher: Batcher) -> list[int]:
    """Return a list to which the batcher appends the length of each head of a prompt that it does not compute again."""
    found: list[int] = []
    fill = batcher.prefixes.fill

    def noted(cache: Any, tokens: tuple[int, ...], length: int) -> None:
        found.append(length)
        fill(cache, tokens, length)

    batcher.prefixes.fill = noted
    return found


def continued(
    model: Any, prompts: Sequence[PromptRow], runtime: Runtime | None = None, **limits: Any
) -> list[tuple[int, ...]]:
    """Return the tokens of rows."""
    return [tokens for tokens, *_ in run(batcher_of(model, runtime, **limits), prompts, runtime)]


WORK = tuple((4 + 7 * number % 23, 3 + 5 * number % 11) for number in range(8))
"""Lengths of prompts and texts."""


def prompts_of(vocabulary: int, **changes: Any) -> list[PromptRow]:
    """Return prompts of different lengths. changes: of their parameters, which are greedy."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length, _ in WORK]
    options = {"temperature": 0.0, **changes}
    return [
        PromptRow(tuple(prompt), SamplingParams(max_tokens=new, ignore_eos=True, **options), seed)
        for seed, (prompt, (_, new)) in enumerate(zip(prompts, WORK, strict=True))
    ]


def alone(plain: Any, rows: Sequence[PromptRow]) -> list[tuple[int, ...]]:
    """Return the tokens with which transformers continues each prompt alone."""
    plain.generation_config = GenerationConfig(pad_token_id=0)
    found = []
    for row in rows:
        ids = torch.tensor([row.prompt])
        made = plain.generate(ids, do_sample=False, max_new_tokens=row.params.max_tokens)
        found.append(tuple(made[0, ids.shape[1] :].tolist()))
    return found


def compare_batches(plain: Any, model: Any, runtime: Runtime | None) -> str:
    """Compare prompts in two batches, which they join and leave, with each alone, as `compare` does."""
    rows = prompts_of(128)
    try:
        expected = alone(plain, rows)
    except Exception:
        return "not on one rank"
    return "right" if continued(model, rows, runtime, rows=3, tokens=16, groups=2) == expected else "WRONG"


def run_interleaved(runtime: Runtime, functions: Sequence[Callable[[], Any]], seeds: Sequence[int]) -> list[Any]:
    """Run functions that call models over these stages, and return their results: while one waits for a message, others
    compute. Raises the first exception of any of them."""
    programs = [Program(function, seed) for function, seed in zip(functions, seeds, strict=True)]
    for program in runtime.loop.run(iter(programs), len(programs)):
        if program.error is not None:
            raise program.error
    return [program.value for program in programs]
