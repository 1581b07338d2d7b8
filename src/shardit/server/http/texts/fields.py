"""The fields of requests for texts as pydantic models: OpenAI's, and those of `SamplingParams` under their own
names."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardit.errors import did_you_mean
from shardit.language.request.sampling_params import SamplingParams
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.schema.field_types import (
    MODEL,
    PRIORITY,
    Label,
    Whole,
    between,
    first_error,
    model_of,
    optional,
)
from shardit.settings.declare import declared

MOST_TEXTS = 128
"""Texts of one request."""
MOST_LOGPROBS = 20
_MOST_STOPS = 16


_Stop: Any = Annotated[str, Field(min_length=1)]
_Count: Any = Annotated[Whole, Field(ge=1, le=2**31)]


class StreamOptions(BaseModel):
    """Additional contents of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = Field(None, description="Whether the last chunk has the numbers of tokens.")
    include_obfuscation: bool | None = Field(None, description="Accepted, without effect.")


class JsonSchema(BaseModel):
    """A schema with a name."""

    model_config = ConfigDict(extra="forbid")
    name: str | None = Field(None, description="Accepted, without effect.")
    description: str | None = Field(None, description="Accepted, without effect; the model does not see it.")
    strict: bool | None = Field(None, description="Accepted, without effect: a schema is always enforced.")
    json_schema: dict[str, Any] = Field(alias="schema", description="A JSON schema that the text validates.")


class ResponseFormat(BaseModel):
    """The form of a text."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class NamedFunction(BaseModel):
    """A function by its name."""

    model_config = ConfigDict(extra="forbid")
    name: str


class NamedChoice(BaseModel):
    """The function that an answer must call."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: NamedFunction


NO_EFFECT: dict[str, Any] = {
    "user": Label,
    "safety_identifier": Label,
    "prompt_cache_key": Label,
    "metadata": dict[str, Label],
    "store": Annotated[bool, Field()],
    "service_tier": Literal["auto", "default"],
    "modalities": Annotated[list[Literal["text"]], Field(max_length=1)],
}
"""OpenAI's fields that change nothing here, and what they may be."""


@dataclass(frozen=True)
class TextFields:
    """The bodies of requests for texts."""

    chat: type[BaseModel]
    completion: type[BaseModel]
    tokenize: type[BaseModel]
    detokenize: type[BaseModel]


def text_fields() -> TextFields:
    """Build the models."""
    prompt: Any = str | Annotated[list[Any], Field(min_length=1)]
    messages: Any = Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools = optional(list[dict[str, Any]], "Functions, which the chat template shows to the model.")
    shared = {**_sampling_fields(), **_openai_fields(), "model": MODEL}
    shared |= {name: optional(kind, "Accepted, without effect.") for name, kind in NO_EFFECT.items()}
    chat = {
        "messages": (messages, Field(description="The conversation: role and content of each message.")),
        "max_completion_tokens": optional(_Count, "Another name of max_tokens."),
        "logprobs": optional(bool, "Whether the answer has log probabilities of its tokens."),
        "top_logprobs": optional(between(0, MOST_LOGPROBS), "Number of most likely tokens with log probabilities."),
        "tools": tools,
        "tool_choice": optional(
            Literal["none", "auto", "required"] | NamedChoice,
            'With "none" the model is not shown the tools; with "required" or a function it must call one.',
        ),
        "parallel_tool_calls": optional(bool, 'Whether an answer with tool_choice "required" may have several calls.'),
    }
    completion = {
        "prompt": (prompt, Field(description="A text, a list of texts, tokens, or a list of lists of tokens.")),
        "logprobs": optional(between(0, MOST_LOGPROBS), "Number of most likely tokens with log probabilities."),
        "best_of": optional(between(1, MOST_TEXTS), "The same number as n."),
        "echo": optional(bool, "Whether a text begins with its prompt, as logprobs then do; these not in a stream."),
        "suffix": optional(str, "Only null or empty: texts are continued, not filled in."),
    }
    tokenize = {
        "model": MODEL,
        "prompt": optional(str, "A text."),
        "messages": optional(messages, "A conversation, instead of a text."),
        "tools": tools,
        "add_special_tokens": optional(bool, "Whether tokens such as a first one are added to a text; true."),
        "add_generation_prompt": optional(bool, "Whether a conversation ends with the start of an answer; true."),
    }
    tokens = {"model": MODEL, "tokens": (list[Whole], Field(description="Tokens by their numbers."))}
    return TextFields(
        chat=model_of("ChatRequest", {**chat, **shared}),
        completion=model_of("CompletionRequest", {**completion, **shared}),
        tokenize=model_of("TokenizeRequest", tokenize),
        detokenize=model_of("DetokenizeRequest", tokens),
    )


def _sampling_fields() -> dict[str, Any]:
    hints, fields = typing.get_type_hints(SamplingParams), {}
    for item in declared(SamplingParams):
        hint, check, kind = hints[item.name], item.metadata["check"], Any
        if hint in (int, int | None) and check is not None:
            kind = Annotated[Whole, Field(ge=check.minimum, le=check.maximum)]
        elif hint is float and check is not None:
            kind = Annotated[float, Field(ge=check.minimum, gt=check.above, le=check.maximum)]
        elif hint is bool:
            kind = bool
        fields[item.name] = optional(kind, item.metadata["help"])
    del fields["logprobs"], fields["prompt_logprobs"]  # OpenAI has other ones
    fields["n"] = optional(between(1, MOST_TEXTS), "Texts for each prompt.")
    fields["max_tokens"] = optional(_Count, "Maximum number of tokens of a text.")
    fields["stop"] = optional(
        _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)], "Texts that end a text and are not part of it."
    )
    form = "As response_format, with the fields json, json_object, regex, choice or grammar of StructuredOutputsParams."
    fields["structured_outputs"] = optional(dict[str, Any], form)
    fields["stop_token_ids"] = optional(list[Annotated[Whole, Field(ge=0)]], "Tokens that end a text.")
    return fields


def _openai_fields() -> dict[str, Any]:
    bias: Any = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
    return {
        "response_format": optional(ResponseFormat, "The form of the text; the prompt should ask for it, too."),
        "stream": optional(bool, "Whether pieces of the text come as server-sent events."),
        "stream_options": optional(StreamOptions, "Additional contents of a stream."),
        "logit_bias": optional(bias, "Numbers to add to the logits of tokens."),
        "priority": PRIORITY,
    }


_AS_GIVEN = ("messages", "prompt", "tools", "response_format", "structured_outputs")
"""Fields in which null has a meaning; they are checked in other places."""

_BY_PATH = ("response_format", "stream_options")
"""Fields that are objects: errors name what is wrong in them."""


def check_fields(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given fields that are not null, checked. Raises ApiError naming the field."""
    for name in values:
        if name not in model.model_fields:
            text = f"there is no field {name!r}{did_you_mean(name, list(model.model_fields))}"
            raise ApiError(400, text, code="unknown_field", param=name)
    try:
        checked = model.model_validate(dict(values), strict=True).model_dump(exclude_none=True)
    except ValidationError as error:
        raise first_error(error, {}, _BY_PATH) from None
    return {name: values[name] if name in _AS_GIVEN else checked[name] for name in checked}
