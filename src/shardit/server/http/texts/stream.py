"""Sends the pieces of texts as server-sent events, as OpenAI does."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from shardit.server.http.answers.events import KEEPALIVE_INTERVAL_S
from shardit.server.http.answers.waiting import ClientGone
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.texts.answers import Answers
from shardit.server.http.texts.running import TextJob


class EventResponse(StreamingResponse):
    """A stream of events; `close` is called in the end, whatever the end is."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], headers: Mapping[str, str]):
        super().__init__(events, headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def events(job: TextJob, answers: Answers) -> AsyncIterator[bytes]:
    """Yield the events of a text job: chunks, the numbers of tokens if they were requested, and the end. An error is an
    event, too, as the answer has begun."""
    sent_at = time.monotonic()
    try:
        for first in answers.first():
            yield _event(first)
        async for chunks in job.chunks():
            pieces = [answers.piece(chunk, *job.logprobs_of(chunk)) for chunk in chunks]
            if sent := b"".join(_event(piece) for piece in pieces if piece is not None):
                yield sent
                sent_at = time.monotonic()
            elif time.monotonic() - sent_at >= KEEPALIVE_INTERVAL_S:
                sent_at = time.monotonic()
                yield b": still here\n\n"
        if job.asked.with_usage:
            yield _event(answers.last(job.finished))
    except ClientGone:
        return
    except ApiError as error:
        yield _event({"error": error.detail()})
    yield b"data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
