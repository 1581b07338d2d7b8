"""The fields of requests for texts as pydantic models: OpenAI's, and those of `SamplingParams` under their own
names."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from shardit.errors import did_you_mean
from shardit.language.request.sampling_params import SamplingParams
from shardit.server.http.schema.errors import ApiError
from shardit.settings.declare import declared

MOST_TEXTS = 128
"""Texts of one request."""
MOST_LOGPROBS = 20
_MOST_STOPS = 16


def _whole(value: Any) -> Any:
    # In JSON, 4.0 is a whole number.
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole: Any = Annotated[int, BeforeValidator(_whole)]
_Label: Any = Annotated[str, Field(max_length=512)]
_Stop: Any = Annotated[str, Field(min_length=1)]
_Count: Any = Annotated[_Whole, Field(ge=1, le=2**31)]


class StreamOptions(BaseModel):
    """Additional contents of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = Field(None, description="Whether a last chunk has the numbers of tokens.")
    include_obfuscation: bool | None = Field(None, description="Changes nothing.")


class JsonSchema(BaseModel):
    """A schema with a name."""

    model_config = ConfigDict(extra="forbid")
    name: str | None = Field(None, description="Changes nothing.")
    description: str | None = Field(None, description="Changes nothing; the model does not see it.")
    strict: bool | None = Field(None, description="Changes nothing: a schema is always kept to.")
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
    "user": _Label,
    "safety_identifier": _Label,
    "prompt_cache_key": _Label,
    "metadata": dict[str, _Label],
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
    model = _optional(str, "The served model, which is also the default.")
    prompt: Any = str | Annotated[list[Any], Field(min_length=1)]
    messages: Any = Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools = _optional(list[dict[str, Any]], "Functions, which the chat template shows to the model.")
    shared = {**_sampling_fields(), **_openai_fields(), "model": model}
    shared |= {name: _optional(kind, "Changes nothing.") for name, kind in NO_EFFECT.items()}
    chat = {
        "messages": (messages, Field(description="The conversation: role and content of each message.")),
        "max_completion_tokens": _optional(_Count, "As max_tokens."),
        "logprobs": _optional(bool, "Whether the answer has log probabilities of its tokens."),
        "top_logprobs": _optional(_between(0, MOST_LOGPROBS), "Also those of so many of the most likely tokens."),
        "tools": tools,
        "tool_choice": _optional(
            Literal["none", "auto", "required"] | NamedChoice,
            'With "none" the model is not shown the tools; with "required" or a function it must call one.',
        ),
        "parallel_tool_calls": _optional(bool, 'Whether an answer with tool_choice "required" may have several calls.'),
    }
    completion = {
        "prompt": (prompt, Field(description="A text, a list of texts, tokens, or a list of lists of tokens.")),
        "logprobs": _optional(_between(0, MOST_LOGPROBS), "Log probabilities of so many tokens for each token."),
        "best_of": _optional(_between(1, MOST_TEXTS), "As n; nothing else is possible."),
        "echo": _optional(bool, "Whether a text begins with its prompt, as logprobs then do; these not in a stream."),
        "suffix": _optional(str, "Only null or empty: texts are continued, not filled in."),
    }
    tokenize = {
        "model": model,
        "prompt": _optional(str, "A text."),
        "messages": _optional(messages, "A conversation, instead of a text."),
        "tools": tools,
        "add_special_tokens": _optional(bool, "Whether tokens such as a first one are added to a text; true."),
        "add_generation_prompt": _optional(bool, "Whether a conversation ends with the start of an answer; true."),
    }
    tokens = {"model": model, "tokens": (list[_Whole], Field(description="Tokens by their numbers."))}
    return TextFields(
        chat=_model("ChatRequest", {**chat, **shared}),
        completion=_model("CompletionRequest", {**completion, **shared}),
        tokenize=_model("TokenizeRequest", tokenize),
        detokenize=_model("DetokenizeRequest", tokens),
    )


def _sampling_fields() -> dict[str, Any]:
    hints, fields = typing.get_type_hints(SamplingParams), {}
    for item in declared(SamplingParams):
        hint, check, kind = hints[item.name], item.metadata["check"], Any
        if hint in (int, int | None) and check is not None:
            kind = Annotated[_Whole, Field(ge=check.minimum, le=check.maximum)]
        elif hint is float and check is not None:
            kind = Annotated[float, Field(ge=check.minimum, gt=check.above, le=check.maximum)]
        elif hint is bool:
            kind = bool
        fields[item.name] = _optional(kind, item.metadata["help"])
    del fields["logprobs"], fields["prompt_logprobs"]  # OpenAI has other ones
    fields["n"] = _optional(_between(1, MOST_TEXTS), "Texts for each prompt.")
    fields["max_tokens"] = _optional(_Count, "Maximum number of tokens of a text.")
    fields["stop"] = _optional(
        _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)], "Texts that end a text and are not part of it."
    )
    form = "As response_format, with the fields json, json_object, regex, choice or grammar of StructuredOutputsParams."
    fields["structured_outputs"] = _optional(dict[str, Any], form)
    fields["stop_token_ids"] = _optional(list[Annotated[_Whole, Field(ge=0)]], "Tokens that end a text.")
    return fields


def _openai_fields() -> dict[str, Any]:
    bias: Any = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
    return {
        "response_format": _optional(ResponseFormat, "The form of the text; the prompt should ask for it, too."),
        "stream": _optional(bool, "Whether pieces of the text come as server-sent events."),
        "stream_options": _optional(StreamOptions, "Additional contents of a stream."),
        "logit_bias": _optional(bias, "Numbers to add to the logits of tokens."),
        "priority": _optional(_between(-10, 10), "Each step is worth ten minutes of waiting."),
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
        raise _first_of(error) from None
    return {name: values[name] if name in _AS_GIVEN else checked[name] for name in checked}


def _first_of(error: ValidationError) -> ApiError:
    problems: Sequence[Any] = error.errors(include_url=False, include_context=False)
    name = str(problems[0]["loc"][0]) if problems[0]["loc"] else None
    if problems[0]["type"] == "missing" and len(problems[0]["loc"]) == 1:
        return ApiError(400, f"{name} is missing; give it", code="missing_field", param=name)
    reasons = [item["msg"].removeprefix("Input ") for item in problems if item["loc"][:1] == (name,)]
    shown = repr(problems[0]["input"])
    shown = shown if len(shown) <= 100 else shown[:100] + " ..."
    path = ".".join(map(str, problems[0]["loc"])) if name in _BY_PATH else name
    text = f"{path} {' or '.join(dict.fromkeys(reasons))}, got {shown}"
    return ApiError(400, text, code="invalid_value", param=name)


def _optional(kind: Any, description: str) -> tuple[Any, Any]:
    return kind | None, Field(None, description=description)


def _between(minimum: int, maximum: int) -> Any:
    return Annotated[_Whole, Field(ge=minimum, le=maximum)]


def _model(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    return create_model(name, __config__=config, **fields)
