"""/v1/completions, /v1/chat/completions"""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from shardit.server.http.schema.errors import answers
from shardit.server.http.schema.openapi import body
from shardit.server.http.state.context import Context
from shardit.server.http.texts.answers import Answers, ChatAnswer, CompletionAnswer
from shardit.server.http.texts.running import TextJob
from shardit.server.http.texts.stream import EventResponse, events
from shardit.server.http.texts.submit import TextSubmission, chat_submission, completion_submission

_POST: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The texts; with stream: true their pieces as events."},
    **answers(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503),
}


def text_routes(context: Context) -> APIRouter:
    """Return the routes of a language model."""
    router = APIRouter(tags=["texts"])

    @router.post(
        "/v1/chat/completions", response_model=ChatAnswer, responses=_POST, openapi_extra=body("chat_completion")
    )
    async def answer_conversation(request: Request) -> Response:
        """Answer a conversation."""
        return await _made(request, context, await chat_submission(request, context))

    @router.post("/v1/completions", response_model=CompletionAnswer, responses=_POST, openapi_extra=body("completion"))
    async def continue_prompts(request: Request) -> Response:
        """Continue prompts."""
        return await _made(request, context, await completion_submission(request, context))

    return router


async def _made(request: Request, context: Context, asked: TextSubmission) -> Response:
    job, shown = TextJob(request, context, asked), Answers(asked, context.options.name)
    headers = {"X-Shardit-Notes": json.dumps(asked.notes)} if asked.notes else {}
    streams = False
    try:
        await job.start()
        if asked.stream:
            streams = True
            return EventResponse(events(job, shown), job.close, headers)
        results = await job.results()
        return JSONResponse(await job.run(shown.whole, *results), headers=headers)
    finally:
        if not streams:
            job.close()
