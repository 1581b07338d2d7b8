"""The fields of requests as pydantic models with the server's limits: OpenAI's fields, and those of diffusers under
their own names."""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from shardit.errors import did_you_mean
from shardit.params import OmniDiffusionSamplingParams, field_names
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
from shardit.server.options import RequestLimits
from shardit.settings.checks import LARGEST
from shardit.settings.declare import declared
from shardit.settings.model_options import OPTION_NAMES


def _is_false(value: Any) -> Any:
    # Literal[False] would also take 0.
    if value is not False:
        raise ValueError("must be false")
    return value


_False: Any = Annotated[bool, BeforeValidator(_is_false), WithJsonSchema({"const": False})]
_Zero: Any = Annotated[int, Field(ge=0, le=0)]

NO_MEANING: dict[str, Any] = {
    "user": Label,
    "safety_identifier": Label,
    "quality": Literal["auto", "standard"],
    "style": Literal["auto"],
    "moderation": Literal["auto", "low"],
    "background": Literal["auto", "opaque"],
    "input_fidelity": Literal["auto"],
    "mask": Literal["auto"],
    "stream": _False | Literal["auto"],
    "partial_images": _Zero | Literal["auto"],
}
"""OpenAI's fields that have no effect here, and their accepted values besides null, which ask for the behaviour that
the server has anyway."""

ENCODING = ("output_format", "output_compression")
"""Fields for the encoding of image files."""

ROUTING = ("model", "response_format", "priority", *ENCODING, *NO_MEANING)
"""Fields that do not affect the result itself."""

IMAGES: tuple[str, ...] = ("image", "input_reference")
"""Fields for images: uploads in multipart requests, data: URLs in JSON."""


class ImageUrl(BaseModel):
    """An image by its address."""

    model_config = ConfigDict(extra="forbid")
    image_url: str = Field(description="data:image/png;base64,... (or JPEG, WebP).")


@dataclass(frozen=True)
class FieldModels:
    """The bodies of requests under the limits of one server."""

    image: type[BaseModel]
    edit: type[BaseModel]
    video: type[BaseModel]
    generation: type[BaseModel]


def field_models(limits: RequestLimits) -> FieldModels:
    """Build the models with these limits."""
    shared = {**_diffusers_fields(limits), **_openai_fields(limits)}
    shared |= {name: optional(kind, "Accepted, without effect.") for name, kind in NO_MEANING.items()}
    source: Any = str | ImageUrl
    images = optional(source | list[source], "Input images as data: URLs.")
    formats = optional(Literal["b64_json", "url", "auto"], "b64_json (default), or url: an address on this server.")
    encoded = {
        "output_format": optional(Literal["png", "jpeg", "webp", "auto"], "Format of the files; png by default."),
        "output_compression": optional(between(0, 100) | Literal["auto"], "Quality of jpeg and webp; 100 by default."),
    }
    as_mp4 = {
        "output_format": optional(Literal["mp4", "auto"], "Videos are MP4 files."),
        "output_compression": optional(Literal["auto"], "Accepted, without effect."),
    }
    image = {**shared, **encoded, "response_format": formats, "image": images}
    length: Any = Annotated[str, Field(pattern=r"^([0-9]{1,9}(\.[0-9]{1,9})?|auto)$")]
    seconds = optional(length | float, "Length: num_frames = round(seconds x fps) + 1.")
    return FieldModels(
        image=model_of("ImageRequest", image),
        edit=model_of("ImageEditRequest", image),
        video=model_of(
            "VideoRequest", {**shared, **as_mp4, "seconds": seconds, "image": images, "input_reference": images}
        ),
        generation=model_of("GenerationRequest", {**shared, "image": images}),
    )


def check_fields(model: type[BaseModel], values: Mapping[str, Any], pipeline_names: Collection[str]) -> dict[str, Any]:
    """Return the given fields that are not null, checked. `pipeline_names` are arguments of the model's pipeline,
    accepted by name even if they are not fields, and null too. Raises ApiError naming the field."""
    known = list(model.model_fields)
    names = set(pipeline_names)
    further = [name for name in pipeline_names if name not in known]
    for name in values:
        if name not in known and name not in further:
            nearest = did_you_mean(name, [each for each in known if _is_of_use(each, names)] + further)
            text = f"there is no field {name!r}" + (_AT_START if name in OPTION_NAMES else nearest)
            raise ApiError(400, text, code="unknown_field", param=name)
    try:
        checked = model.model_validate({name: values[name] for name in values if name in known}, strict=True)
    except ValidationError as error:
        raise _first_of(error) from None
    given = checked.model_dump(exclude_none=True)
    return {**given, **{name: values[name] for name in further if name in values}}


_AT_START = "; it is chosen for all requests when the server is started (shardit serve --help)"


def _is_of_use(name: str, pipeline_names: Collection[str]) -> bool:
    """Return whether a field affects the output of this pipeline, so that a client may mean it."""
    return name in pipeline_names or (name not in NO_MEANING and name not in _OF_DIFFUSERS)


_OF_DIFFUSERS = frozenset(field_names())


def _diffusers_fields(limits: RequestLimits) -> dict[str, Any]:
    most = {
        "width": limits.pixels,
        "height": limits.pixels,
        "num_frames": limits.frames,
        "num_inference_steps": limits.steps,
        "num_outputs_per_prompt": limits.outputs,
        "max_sequence_length": limits.prompt_tokens,
    }
    hints, fields = typing.get_type_hints(OmniDiffusionSamplingParams), {}
    for item in declared(OmniDiffusionSamplingParams):
        hint, check = hints[item.name], item.metadata["check"]
        if hint == str | None:
            hint = Annotated[str, Field(max_length=limits.prompt_chars)]
        elif hint in (int, int | None):
            hint = Annotated[Whole, Field(ge=check.minimum, le=most.get(item.name, check.maximum))]
        elif hint == float | None:
            highest = LARGEST if check.maximum is None else check.maximum
            hint = Annotated[float, Field(ge=check.minimum, le=highest)]
        fields[item.name] = optional(hint, item.metadata["help"])
    return {
        **fields,
        "output_type": optional(Literal["pil"], "Form of the results: images."),
        "extra_args": optional(
            dict[str, Any],
            "Further arguments of the model's pipeline by name; they may also be given as fields of the request.",
        ),
    }


def _openai_fields(limits: RequestLimits) -> dict[str, Any]:
    size: Any = Annotated[str, Field(pattern=r"^([0-9]{1,30}x[0-9]{1,30}|auto)$")]
    return {
        "prompt": (
            Annotated[str, Field(max_length=limits.prompt_chars)],
            Field(description="Description of the output."),
        ),
        "model": MODEL,
        "n": optional(between(1, limits.outputs), "Number of results."),
        "size": optional(size, "WIDTHxHEIGHT in pixels."),
        "priority": PRIORITY,
    }


def _is_list(hint: Any) -> bool:
    return any(typing.get_origin(one) is Sequence for one in typing.get_args(hint))


_SHAPES = {
    **{
        name: "must be a number, or a list of numbers"
        if float in typing.get_args(hint)
        else "must be a list of numbers"
        for name, hint in typing.get_type_hints(OmniDiffusionSamplingParams).items()
        if _is_list(hint)
    },
    "size": 'must be WIDTHxHEIGHT in pixels, as in "1280x704", or "auto"',
    "seconds": 'must be a number above 0, as in "4"',
    **dict.fromkeys(IMAGES, 'must be an upload, a data: URL, {"image_url": ...} with one, or a list of these'),
}
"""Readable forms of types that pydantic can only describe as a pattern or a union."""


def _meant(kind: Any) -> str:
    """Describe the accepted values of a field without effect, besides null."""
    plain = [word for one, word in ((_False, "false"), (_Zero, "0")) if one in typing.get_args(kind)]
    texts = [one for one in typing.get_args(kind) if isinstance(one, str)] or ["auto"]
    return " or ".join(["null", *plain, *map(repr, texts)])


def _first_of(error: ValidationError) -> ApiError:
    problem = error.errors(include_url=False, include_context=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if name in NO_MEANING and NO_MEANING[name] is not Label:
        text = f"{name} {problem['input']!r} has no meaning here; leave it out, or give {_meant(NO_MEANING[name])}"
        return ApiError(400, text, code="unsupported_value", param=name)
    return first_error(error, _SHAPES)
