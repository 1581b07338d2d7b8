"""Streams texts in pieces while the ranks generate them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from shardit.engine.tasks.task import OnProgress
from shardit.language.request.outputs import CompletionChunk, RowResult
from shardit.language.request.prompt_batch import PromptBatch
from shardit.language.request.text_stream import TextStream

T = TypeVar("T")


class Pieces:
    """The texts of a call of `LLM` so far."""

    def __init__(self, batch: PromptBatch):
        self._batch = batch
        self._streams = [
            TextStream(lambda ids, row=row: batch.decode(ids, row), row.params.stops, row.params.min_tokens)
            for *_, row in batch.rows
        ]
        self._tokens: list[list[int]] = [[] for _ in batch.rows]
        self._given = [0] * len(batch.rows)

    def takes(self, groups: list[list[int]], give: Callable[[CompletionChunk | None], None]) -> OnProgress:
        """Return a progress callback that passes chunks of the tokens of each step to `give`. groups: row numbers of
        each group."""

        def on_progress(index: int, step: int, total: int, made: Any = None, /) -> None:
            for number, token in zip(groups[index], made, strict=True):
                if token is not None:
                    self._tokens[number].append(token)
                    if text := self._streams[number].add(token):
                        give(self._chunk(number, text, self._tokens[number]))
            give(None)

        return on_progress

    def rest(self, results: list[RowResult]) -> list[CompletionChunk]:
        """Return the last chunk of each row."""
        found = []
        for number, result in enumerate(results):
            whole = self._batch.completion(number, result)
            text = self._streams[number].end(whole.text)
            found.append(self._chunk(number, text, result[0], whole.finish_reason, whole.stop_reason))
        return found

    def _chunk(self, number: int, text: str, tokens: Any, *reasons: Any) -> CompletionChunk:
        prompt, copy, _ = self._batch.rows[number]
        new, self._given[number] = tuple(tokens[self._given[number] :]), len(tokens)
        return CompletionChunk(prompt, copy, text, new, *reasons)


def in_background(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread that nothing waits for when the program ends, unlike those of an executor: after Ctrl-C
    imports would keep it for many seconds."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="shardit-background", daemon=True).start()
    return found


def in_thread(
    run: Callable[[Callable[[T | None], None]], Any], rest: Callable[[Any], list[T]], cancel: Callable[[], None]
) -> Iterator[T]:
    """Yield the values that `run(give)` gives while it runs in another thread, except None, then `rest` of its result.

    If the iterator is closed early, `cancel` is called in that thread, and the iterator waits for the end of `run`.
    Raises the exceptions of `run`.
    """
    found: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    left = threading.Event()

    def give(one: T | None) -> None:
        if left.is_set():
            cancel()
        elif one is not None:
            found.put(("value", one))

    def work() -> None:
        try:
            for one in rest(run(give)):
                found.put(("value", one))
            found.put(("end", None))
        except BaseException as error:
            found.put(("error", error))

    thread = threading.Thread(target=work, name="shardit-stream", daemon=True)
    thread.start()
    try:
        while (item := found.get())[0] == "value":
            yield item[1]
        if item[0] == "error":
            raise item[1]
    finally:
        left.set()
        thread.join()
