"""Texts in the format of OpenAI: whole answers and the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from shardit.language.request.outputs import CompletionChunk, CompletionOutput, RowResult, ended_by_token
from shardit.server.http.texts.submit import TextSubmission
from shardit.server.http.texts.token_texts import TokenTexts
from shardit.server.http.texts.tool_calls import ParsedPiece, ToolCalls

Reason = Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(BaseModel):
    """A function and its arguments, as JSON in a text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str | None = Field(description="Null if there are calls and no text.")
    refusal: None
    tool_calls: list[ToolCall] = Field([], description="Only if there are calls.")


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Reason


class ChatAnswer(BaseModel):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(BaseModel):
    """One text behind a prompt."""

    index: int = Field(description="Number of the prompt x n + number of the text.")
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Reason


class CompletionAnswer(BaseModel):
    """Texts behind prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


def usage_of(asked: TextSubmission, results: Sequence[RowResult]) -> dict[str, int]:
    """Return the numbers of tokens; each prompt counts once."""
    prompt, made = sum(len(tokens) for _, tokens in asked.batch.prompts), sum(len(row[0]) for row in results)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


class Answers:
    """Makes the answers to one request. model: the name of the model for clients."""

    def __init__(self, asked: TextSubmission, model: str):
        self.asked = asked
        kind = "chat.completion" if asked.chat else "text_completion"
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{asked.new.id.partition('_')[2]}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._texts = TokenTexts(asked.batch.tokenizer)
        self._offsets = [0] * len(asked.batch.rows)
        self._calls = [ToolCalls() for _ in asked.batch.rows] if asked.has_calls else None

    def whole(
        self, results: Sequence[RowResult], prompts: Sequence[Sequence[Mapping[int, float]] | None]
    ) -> dict[str, Any]:
        """Return the answer that is not streamed. prompts: log probabilities of the prompt of each text, from its
        second token on."""
        choices = []
        for index, result in enumerate(results):
            text = self.asked.batch.completion(index, result)
            own = {"text": self._echo(index) + text.text}
            if self.asked.chat:
                own = {"message": self._message(index, text.text)}
            choices.append(
                {
                    "index": index,
                    **own,
                    "logprobs": self._with_prompt(
                        index, prompts, self.logprobs(index, text.token_ids, text.logprobs, text)
                    ),
                    "finish_reason": self._reason(index, text.finish_reason),
                }
            )
        return {**self._head, "choices": choices, "usage": usage_of(self.asked, results)}

    def _with_prompt(
        self, index: int, prompts: Sequence[Sequence[Mapping[int, float]] | None], own: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Return the log probabilities of a text behind those of its prompt, if it begins with that."""
        if own is None or not self.asked.echo:
            return own
        batch, echo = self.asked.batch, self._echo(index)
        number = batch.rows[index][0]
        tokens = batch.prompts[number][1]
        values = prompts[number * batch.rows[0][2].params.n]  # the first text of the prompt has them
        pairs = list(zip(tokens, [None, *(values or [None] * (len(tokens) - 1))], strict=True))
        length = sum(len(self._texts.text(token)) for token in tokens)
        found, _ = self._texts.columns(pairs, self.asked.logprobs or 0, len(echo) - length)
        own["text_offset"] = [len(echo) + offset for offset in own["text_offset"]]
        return {name: [*found[name], *own[name]] for name in own}

    def _message(self, index: int, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        if self._calls is None:
            return message
        found = self._calls[index].add(text, is_last=True)
        calls = [{name: call[name] for name in ("id", "type", "function")} for call in found.calls]
        return {**message, "content": found.text or None, "tool_calls": calls} if calls else message

    def _reason(self, index: int, reason: str | None) -> str | None:
        called = self._calls is not None and self._calls[index].count > 0
        return "tool_calls" if called and reason == "stop" else reason

    def first(self) -> list[dict[str, Any]]:
        """Return the chunks with which a stream begins: the roles, or the prompts if they are repeated."""
        rows = range(len(self.asked.batch.rows))
        if not self.asked.chat:
            return [self._chunk(n, self._echo(n)) for n in rows if self.asked.echo]
        return [self._chunk(n, {"role": "assistant", "content": ""}) for n in rows]

    def _echo(self, index: int) -> str:
        return self.asked.echo[self.asked.batch.rows[index][0]] if self.asked.echo else ""

    def piece(
        self, chunk: CompletionChunk, tokens: Sequence[int], values: Sequence[Mapping[int, float]]
    ) -> dict[str, Any] | None:
        """Return a chunk with a piece of a text; None if nothing is certain with it. tokens, values: log probabilities
        that go with it."""
        index, reason = self.asked.row_of(chunk), chunk.finish_reason
        shown = self.logprobs(index, tokens, values, chunk) if values else None
        if not self.asked.chat:
            return self._chunk(index, chunk.text, shown, reason)
        found = ParsedPiece(chunk.text)
        if self._calls is not None:
            found = self._calls[index].add(chunk.text, is_last=reason is not None)
        parts = {"content": found.text, "tool_calls": found.calls}
        content = {name: part for name, part in parts.items() if part}
        if not content and shown is None and reason is None:
            return None
        return self._chunk(index, content, shown, self._reason(index, reason))

    def last(self, results: Sequence[RowResult]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens."""
        return {**self._with_kind(), "choices": [], "usage": usage_of(self.asked, results)}

    def _with_kind(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self.asked.chat else dict(self._head)

    def _chunk(self, index: int, content: Any, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        own = {"delta" if self.asked.chat else "text": content}
        choice = {"index": index, **own, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.asked.with_usage else {}
        return {**self._with_kind(), "choices": [choice], **usage}

    def logprobs(
        self,
        index: int,
        tokens: Sequence[int],
        values: Sequence[Mapping[int, float]] | None,
        text: CompletionOutput | CompletionChunk,
    ) -> dict[str, Any] | None:
        """Return the log probabilities of tokens of a text, without that of a token that ended it."""
        most = self.asked.logprobs
        if most is None or values is None:
            return None
        pairs = list(zip(tokens, values, strict=False))
        by_token = ended_by_token(text.finish_reason, text.stop_reason)
        pairs = pairs[:-1] if by_token and len(values) == len(tokens) else pairs
        if self.asked.chat:
            return {"content": [self._texts.entry(*pair, most) for pair in pairs], "refusal": None}
        found, self._offsets[index] = self._texts.columns(pairs, most, self._offsets[index])
        return found
