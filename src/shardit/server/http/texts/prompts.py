"""From the fields of a request to tokens and sampling parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from shardit.errors import InputError
from shardit.language.info import LanguageInfo
from shardit.language.request.defaults import recommended
from shardit.language.request.messages import chat_tokens, tool_notes
from shardit.language.request.prompts import check_tokens, tokens_of
from shardit.language.request.sampling_params import SamplingParams
from shardit.server.http.schema.errors import ApiError, from_input_error
from shardit.server.http.texts.forms import form_of

MOST_PROMPTS = 128
_OWN = ("seed", "logprobs", "prompt_logprobs")
_SAMPLING = [item.name for item in dataclasses.fields(SamplingParams) if item.name not in _OWN]


def sampling_of(
    values: Mapping[str, Any], info: LanguageInfo, logprobs: int | None, most: int | None
) -> SamplingParams:
    """Return the sampling parameters of a request, without its seed. most: default number of tokens. Raises
    ApiError."""
    given = {name: values[name] for name in _SAMPLING if name in values}
    given |= {"logprobs": logprobs, "prompt_logprobs": logprobs if values.get("echo") else None}
    given["stop"] = given.get("stop") or None
    given["structured_outputs"] = form_of(values)
    given["logit_bias"] = {int(token): value for token, value in (values.get("logit_bias") or {}).items()} or None
    try:
        params = SamplingParams(**{**recommended(info.defaults), "max_tokens": most, **given})
        check_tokens(params, info.vocabulary)
    except InputError as error:
        raise from_input_error(error, values) from error
    return params


def chat_prompt(tokenizer: Any, values: Mapping[str, Any]) -> list[int]:
    """Return the tokens of a conversation. Raises ApiError."""
    tools = values.get("tools") if values.get("tool_choice") != "none" else None
    try:
        return chat_tokens(
            tokenizer, values["messages"], None, tools or None, values.get("add_generation_prompt", True)
        )
    except InputError as error:
        text = str(error).replace("give chat_template, or a prompt to generate()", "send a prompt to /v1/completions")
        raise ApiError(400, text, code="invalid_value", param="messages") from error


def notes_of(tokenizer: Any, values: Mapping[str, Any]) -> list[str]:
    """Return what the model does not see of a request."""
    return tool_notes(None if values.get("tool_choice") == "none" else values.get("tools"), tokenizer.chat_template)


def text_prompts(tokenizer: Any, prompt: Any, vocabulary: int) -> list[list[int]]:
    """Return the tokens of the prompts of a completion: a text, texts, tokens, or lists of these. Raises ApiError."""
    several = not isinstance(prompt, str) and not all(_is_token(one) for one in prompt)
    prompts: Sequence[Any] = prompt if several else [prompt]
    if len(prompts) > MOST_PROMPTS:
        text = f"prompt must be at most {MOST_PROMPTS} prompts, got {len(prompts)}; send several requests"
        raise ApiError(400, text, code="invalid_value", param="prompt")
    try:
        return [list(tokens_of(one, tokenizer, vocabulary)[1]) for one in map(_checked_prompt, prompts)]
    except InputError as error:
        raise ApiError(400, _of_prompt(str(error)), code="invalid_value", param="prompt") from error


def prompt_texts(tokenizer: Any, prompt: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of prompts: as they were given, or those of their tokens."""
    given = [prompt] if isinstance(prompt, str) else prompt
    if all(isinstance(one, str) for one in given):
        return list(given)
    decode = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(tokens, **decode) for tokens in prompts]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_prompt(prompt: Any) -> Any:
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_token, prompt))):
        return prompt
    raise InputError(f"prompt must be a text, texts, tokens or lists of tokens, got {prompt!r:.80}")


def _of_prompt(text: str) -> str:
    return text.replace("prompt_token_ids must be", "tokens of prompt must be")


def check_length(prompts: Sequence[Sequence[int]], limit: int | None, param: str) -> None:
    """Raise ApiError for a prompt that leaves no room for a text. Prompts are never shortened."""
    for tokens in prompts:
        if not tokens:
            text = f"{param} has no tokens; give it a text that is not empty"
            raise ApiError(400, text, code="invalid_value", param=param)
        if limit is not None and len(tokens) >= limit:
            text = (
                f"{param} has {len(tokens)} tokens, and the model has room for {limit} tokens of prompt and text "
                "together; send a shorter one"
            )
            raise ApiError(400, text, code="context_length_exceeded", param=param)
