"""Rows that a rank continues in batches, without processes of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardit.core.runtime.request_loop import Schedule, Turns
from shardit.core.stages.runtime import Runtime
from shardit.language.batching.batcher import Batcher
from shardit.language.batching.scheduler import Limits
from shardit.language.request.outputs import RowResult
from shardit.language.request.rows import PromptGroup, Row


def batcher_of(model: Any, runtime: Runtime | None = None, **limits: Any) -> Batcher:
    """Return a batcher in whose memory each column of a row takes one byte."""
    wanted = Limits(**{"rows": 32, "tokens": 512, **limits})
    return Batcher(model, runtime, wanted, lambda columns: columns, frozenset(), 0, lambda *_: "")


def run(batcher: Batcher, rows: Sequence[Row], runtime: Runtime | None = None) -> list[RowResult]:
    """Run rows, each as a request, and return their results."""
    found: dict[int, RowResult] = {}
    batcher.on_end = lambda key, results: found.update({key: results[0]})
    turns = Turns(Schedule(0)) if runtime is None else runtime.turns
    batcher.pause = turns.yield_turn
    for key, row in enumerate(rows):
        batcher.add(key, PromptGroup(key, (row,)), lambda *_: None)
    starts = lambda _: batcher.program()  # noqa: E731
    for program in turns.rounds(starts, lambda active: active > 0 or batcher.is_open):
        batcher.ended(program)
        if program.error is not None:
            raise program.error
    return [found[key] for key in range(len(rows))]


def continued(model: Any, rows: Sequence[Row], runtime: Runtime | None = None, **limits: Any) -> list[tuple[int, ...]]:
    """Return the tokens of rows."""
    return [tokens for tokens, *_ in run(batcher_of(model, runtime, **limits), rows, runtime)]
