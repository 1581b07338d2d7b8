"""A text job while its client waits: it is stored, followed, and deleted in the end, since nobody can ask for it
again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from shardit.engine.streaming import Pieces
from shardit.language.request.outputs import CompletionChunk, RowResult
from shardit.server.estimate import NO_WORK
from shardit.server.http.answers.waiting import POLL_INTERVAL_S, ClientGone, check_completed, client_gone, until_ended
from shardit.server.http.schema.errors import ApiError, busy
from shardit.server.http.state.context import Context
from shardit.server.http.submit.submit import store_job
from shardit.server.http.texts.submit import TextSubmission, texts_of
from shardit.server.jobs.job import Job
from shardit.server.jobs.text_request import prompt_logprobs_of, results_of
from shardit.server.messages import Tokens

T = TypeVar("T")
_cleaning: set[asyncio.Task[None]] = set()
"""Holds tasks, which would end otherwise."""


class TextJob:
    """One text job. Its tokens are received from `start` on; `close` has to be called in the end."""

    def __init__(self, request: Request, context: Context, asked: TextSubmission):
        self.asked = asked
        self._request, self._context = request, context
        self._stack = ExitStack()
        self._watch = self._stack.enter_context(context.live_state.watching(asked.new.id, steps=asked.stream))
        self._pieces = Pieces(asked.batch)
        self._found: list[CompletionChunk | None] = []
        self._take = self._pieces.takes([list(range(len(asked.batch.rows)))], self._found.append)
        self._logprobs: list[list[dict[int, float]]] = [[] for _ in asked.batch.rows]
        self._given = [0] * len(asked.batch.rows)
        self.finished: list[RowResult] = []
        """The result of each text, once all have been streamed."""
        self._job: Job | None = None

    async def start(self) -> None:
        """Put the job into the queue. Raises ApiError if there is no room."""
        self._request.scope["state"]["job"] = self.asked.new.id
        self._job, _ = await run_in_threadpool(store_job, self._context, self.asked.new, NO_WORK)
        self._context.live_state.wake()

    async def results(self) -> tuple[list[RowResult], list[list[dict[int, float]] | None]]:
        """Wait for the end; return the result of each text, and log probabilities of its prompt. Raises ApiError if the
        job fails, ClientGone."""
        assert self._job is not None
        job = await until_ended(self._request, self._context, self._job)
        check_completed(job)
        return results_of(job.details), prompt_logprobs_of(job.details)

    async def chunks(self) -> AsyncIterator[list[CompletionChunk]]:
        """Yield pieces of the texts as they come, then the last ones; an empty list now and then while nothing comes.
        Raises ApiError if the job fails, ClientGone."""
        gone = asyncio.ensure_future(client_gone(self._request))
        gone.add_done_callback(lambda _: self._watch.notify())
        try:
            while True:
                if found := self._read(self._watch.taken()):
                    yield found
                job = await self._changed_job()
                if job is not None and job.ended:
                    break
                await self._news(gone)
                yield []
        finally:
            gone.cancel()
        if found := self._read(self._watch.taken()):
            yield found
        check_completed(job)
        self.finished = results_of(job.details)
        yield await self.run(self._pieces.rest, self.finished)

    def logprobs_of(self, chunk: CompletionChunk) -> tuple[Sequence[int], Sequence[dict[int, float]]]:
        """Return tokens and their log probabilities that go with a chunk: those of its tokens if ranks send them step
        by step, else all with the last chunk."""
        row = self.asked.row_of(chunk)
        begin = self._given[row]
        if chunk.finish_reason is not None:
            tokens, _, _, values = self.finished[row]
            return tokens[begin:], (values or [])[begin:]
        values = self._logprobs[row][begin : begin + len(chunk.token_ids)]
        self._given[row] += len(values)
        return chunk.token_ids[: len(values)], values

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run work that takes longer than the event loop should wait."""
        return await texts_of(self._context).run(work, *arguments)

    async def _changed_job(self) -> Job | None:
        """Return the job if it may have changed. Raises ApiError if it is gone."""
        if not self._watch.changed():
            return None
        found = await run_in_threadpool(self._context.store.get, self.asked.new.id)
        if found is None:
            raise ApiError(404, f"the job {self.asked.new.id} was deleted", code="not_found")
        return found

    async def _news(self, gone: asyncio.Future[None]) -> None:
        if self._context.live_state.stopping:
            raise busy("the server is about to end; send the request again later", 5, "stopping")
        await self._watch.wait(POLL_INTERVAL_S)
        if gone.done():
            raise ClientGone

    def _read(self, steps: Sequence[Tokens]) -> list[CompletionChunk]:
        for tokens in steps:
            for row, values in enumerate(tokens.logprobs or ()):
                if values is not None:
                    self._logprobs[row].append(values)
            self._take(0, 0, 0, tokens.made)
        found = [one for one in self._found if one is not None]
        self._found.clear()
        return found

    def close(self) -> None:
        """Stop following the job and delete it; one that runs is cancelled."""
        self._stack.close()
        if self._job is not None:
            task = asyncio.get_running_loop().create_task(_delete(self._context, self._job.id))
            _cleaning.add(task)
            task.add_done_callback(_cleaning.discard)


async def _delete(context: Context, job_id: str) -> None:
    await run_in_threadpool(context.store.delete, job_id)
    context.live_state.wake()
