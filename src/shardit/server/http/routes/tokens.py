"""/tokenize, /detokenize"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from shardit.server.http.schema.errors import ApiError, answers
from shardit.server.http.schema.openapi import body
from shardit.server.http.state.context import Context
from shardit.server.http.texts.prompts import chat_prompt
from shardit.server.http.texts.submit import language_info, read_fields, texts_of

_POST = answers(400, 401, 403, 404, 408, 413, 415, 503)


class TokensAnswer(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int | None = Field(description="Maximum number of tokens of prompt and text together.")
    tokens: list[int]


class TextAnswer(BaseModel):
    """The text of tokens."""

    prompt: str


def token_routes(context: Context) -> APIRouter:
    """Return the routes of the tokenizer."""
    router = APIRouter(tags=["texts"])

    @router.post("/tokenize", response_model=TokensAnswer, responses=_POST, openapi_extra=body("tokenize"))
    async def tokenize(request: Request) -> Any:
        """The tokens that the model gets for a text or a conversation."""
        values = await read_fields(request, context, context.text_fields.tokenize)
        if ("prompt" in values) == ("messages" in values):
            raise ApiError(400, "give either prompt or messages", code="invalid_value", param="prompt")
        info, texts = await language_info(context), texts_of(context)
        tokenizer = await texts.tokenizer()
        if "messages" in values:
            tokens = await texts.run(chat_prompt, tokenizer, values)
        else:
            special = values.get("add_special_tokens", True)
            tokens = await texts.run(lambda: tokenizer(values["prompt"], add_special_tokens=special)["input_ids"])
        limit = context.options.language.max_model_len or info.max_model_len
        return {"count": len(tokens), "max_model_len": limit, "tokens": list(tokens)}

    @router.post("/detokenize", response_model=TextAnswer, responses=_POST, openapi_extra=body("detokenize"))
    async def detokenize(request: Request) -> Any:
        """The text of tokens, with special tokens."""
        values = await read_fields(request, context, context.text_fields.detokenize)
        info, texts = await language_info(context), texts_of(context)
        if wrong := [one for one in values["tokens"] if not 0 <= one < info.vocabulary]:
            text = f"tokens must be from 0 to {info.vocabulary - 1}, got {wrong[0]}"
            raise ApiError(400, text, code="invalid_value", param="tokens")
        tokenizer = await texts.tokenizer()
        decode = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return {"prompt": await texts.run(lambda: tokenizer.decode(values["tokens"], **decode))}

    return router
