"""Turns a body into a text job. Its tokens and parameters are final: ranks are given nothing that can be wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from shardit.errors import InputError
from shardit.language.info import LanguageInfo
from shardit.language.request.outputs import CompletionChunk
from shardit.language.request.prompt_batch import PromptBatch
from shardit.language.request.sampling_params import SamplingParams
from shardit.params import RANDOM_SEED, seed_or_drawn
from shardit.server.http.schema.errors import ApiError, busy, from_input_error
from shardit.server.http.state.context import Context
from shardit.server.http.submit.body import read_json
from shardit.server.http.submit.resolve import check_model
from shardit.server.http.submit.submit import check_open, owner
from shardit.server.http.texts.fields import MOST_TEXTS, check_fields
from shardit.server.http.texts.forms import check_form_of
from shardit.server.http.texts.prompts import (
    chat_prompt,
    check_length,
    notes_of,
    prompt_texts,
    sampling_of,
    text_prompts,
)
from shardit.server.http.texts.text_model import TextModel
from shardit.server.http.texts.tools import has_calls
from shardit.server.jobs.job import NewJob, new_id
from shardit.server.jobs.text_request import rows_of_prompts, stored_request

_COMPLETION_TOKENS = 16
"""Default number of tokens of a completion, as of OpenAI."""


@dataclass(frozen=True)
class TextSubmission:
    """A checked request. new: its job. batch: its texts. logprobs: how many most likely tokens it wants for each token,
    None for none at all."""

    new: NewJob
    batch: PromptBatch
    stream: bool
    with_usage: bool
    logprobs: int | None
    chat: bool
    has_calls: bool = False
    """Whether calls of tools are looked for in the texts."""
    echo: Sequence[str] = ()
    """The texts of the prompts, if texts begin with these."""
    notes: Sequence[str] = ()
    """Differences from the request."""

    def row_of(self, chunk: CompletionChunk) -> int:
        """Return the number of the text of a chunk among all texts."""
        return chunk.prompt_index * self.batch.rows[0][2].params.n + chunk.index


async def read_fields(request: Request, context: Context, model: type[BaseModel]) -> dict[str, Any]:
    """Read and check the fields of a request to the language model. Raises ApiError."""
    check_open(context)
    if not context.options.of_language:
        text = "this server serves no language model; see GET /v1/server for what it makes"
        raise ApiError(400, text, code="wrong_kind", param="model")
    if "idempotency-key" in request.headers:
        text = "texts are not kept, so a key cannot give one again; leave the header Idempotency-Key out"
        raise ApiError(400, text, code="unsupported_value", param="Idempotency-Key")
    values = check_fields(model, await read_json(request))
    check_model(values, context.options)
    return values


async def language_info(context: Context) -> LanguageInfo:
    """Return the facts about the model, once they are known: its files may not state them, so the request waits until
    the ranks have loaded it. Raises ApiError if the server ends before."""
    info = await context.live_state.loaded()
    if not isinstance(info, LanguageInfo):
        raise busy("the server is about to end; send the request again later", 5, "stopping")
    return info


def texts_of(context: Context) -> TextModel:
    """Return the tokenizer of the served language model."""
    assert context.texts is not None
    return context.texts


async def completion_submission(request: Request, context: Context) -> TextSubmission:
    """Read and check a request to continue prompts. Raises ApiError."""
    values = await read_fields(request, context, context.text_fields.completion)
    _check_completion(values)
    info, logprobs = await language_info(context), values.get("logprobs")
    params = sampling_of(values, info, logprobs, _COMPLETION_TOKENS)

    def read(tokenizer: Any) -> list[list[int]]:
        return text_prompts(tokenizer, values["prompt"], info.vocabulary)

    return await _build(request, context, values, params, read, chat=False)


def _check_completion(values: Mapping[str, Any]) -> None:
    name, problem = "", ""
    if values.get("echo") and "logprobs" in values and values.get("stream"):
        name, problem = "echo", "with logprobs does not go with stream; leave one of the three out"
    elif values.get("suffix"):
        name, problem = "suffix", "must be empty: texts are continued, not filled in; leave it out"
    elif values.get("best_of", values.get("n", 1)) != values.get("n", 1):
        name, problem = "best_of", "must be as n, since texts are not ranked; leave it out"
    if problem:
        raise ApiError(400, f"{name} {problem}", code="unsupported_value", param=name)


async def chat_submission(request: Request, context: Context) -> TextSubmission:
    """Read and check a request to answer a conversation. Raises ApiError."""
    values = await read_fields(request, context, context.text_fields.chat)
    most = values.pop("max_completion_tokens", None)
    if most is not None and values.setdefault("max_tokens", most) != most:
        text = f"max_completion_tokens and max_tokens disagree ({most} and {values['max_tokens']}); give one of them"
        raise ApiError(400, text, code="invalid_value", param="max_completion_tokens")
    logprobs = values.get("top_logprobs", 0) if values.get("logprobs") else None
    if values.get("top_logprobs") and logprobs is None:
        text = "top_logprobs needs logprobs; set it to true"
        raise ApiError(400, text, code="invalid_value", param="top_logprobs")
    params = sampling_of(values, await language_info(context), logprobs, None)
    return await _build(request, context, values, params, lambda tokenizer: [chat_prompt(tokenizer, values)], chat=True)


async def _build(
    request: Request,
    context: Context,
    values: Mapping[str, Any],
    params: SamplingParams,
    read: Callable[[Any], list[list[int]]],
    *,
    chat: bool,
) -> TextSubmission:
    if values.get("stream_options") and not values.get("stream"):
        text = "stream_options needs stream; set it to true"
        raise ApiError(400, text, code="invalid_value", param="stream_options")
    texts, info = texts_of(context), await language_info(context)
    tokenizer = await texts.tokenizer()
    prompts = await texts.run(read, tokenizer)
    if len(prompts) * params.n > MOST_TEXTS:
        text = f"n texts for each prompt are {len(prompts) * params.n} texts, the limit is {MOST_TEXTS}; ask for fewer"
        raise ApiError(400, text, code="invalid_value", param="n")
    limit = context.options.language.max_model_len or info.max_model_len
    check_length(prompts, limit, "messages" if chat else "prompt")
    await texts.run(check_form_of, params.structured_outputs, values, tokenizer)
    given = values.get("seed", RANDOM_SEED)
    seeds = [seed_or_drawn(None if given == RANDOM_SEED else given) for _ in prompts]
    stored = stored_request(prompts, params, seeds, limit)
    try:
        rows = rows_of_prompts(stored)
    except InputError as error:
        raise from_input_error(error, values) from error
    new = NewJob(
        kind="text",
        request=stored,
        seed=seeds[0],
        cost=0.0,
        owner=owner(request),
        priority=values.get("priority", 0),
        waits=True,
        id=new_id("text"),
    )
    batch = PromptBatch(tokenizer, [(None, tuple(tokens)) for tokens in prompts], rows)
    with_usage = bool(values.get("stream_options", {}).get("include_usage"))
    notes = notes_of(tokenizer, values)
    echo = await texts.run(prompt_texts, tokenizer, values["prompt"], prompts) if values.get("echo") else ()
    flags = {"with_usage": with_usage, "chat": chat, "has_calls": has_calls(values, tokenizer)}
    return TextSubmission(
        new, batch, bool(values.get("stream")), logprobs=params.logprobs, echo=echo, notes=notes, **flags
    )
