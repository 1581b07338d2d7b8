"""Maps a client's fields to arguments of the pipeline: sizes, lengths, counts, and the defaults of tiny models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardit.diffusion.output.target import side_problem
from shardit.diffusion.request.argument_values import check_attention, checked_value
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature, only_numbers
from shardit.diffusion.request.result_limits import limit_problem
from shardit.diffusion.request.size_search import SIDES
from shardit.diffusion.request.step_lists import steps_problem
from shardit.errors import InputError
from shardit.models import tiny
from shardit.params import FRAME_RATE, field_names
from shardit.server.http.schema.errors import ApiError, from_input_error
from shardit.server.http.schema.fields import ENCODING, IMAGES, ROUTING
from shardit.server.options import RequestLimits, ServeOptions

# Arguments of pipelines that are tensors, images or functions, which no JSON value can be, and files of this machine.
_NOT_SENDABLE = re.compile(
    r"^output_type$|embeds|latents|mask|image|video|callback|generator|guess|processor|(^|_)(file|path|url)s?($|_)"
)


def pipeline_names(info: ModelInfo | None) -> list[str]:
    """Return the arguments of the model's pipelines that a client can give by name."""
    names: dict[str, None] = {}
    for signature in info.signatures if info is not None else ():
        names.update(dict.fromkeys(name for name in signature.choices if _is_sendable(name, signature)))
    return list(names)


def with_prompt(values: Mapping[str, Any], info: ModelInfo) -> Mapping[str, Any]:
    """Return the fields of a request with an empty prompt, which all requests have, if the pipeline takes none."""
    taken = any("prompt" in signature.names for signature in info.signatures)
    return values if taken or values.get("prompt") is not None else {**values, "prompt": ""}


def _is_sendable(name: str, takes: PipelineSignature) -> bool:
    # A text for an image would be a path on this machine. A number is none, whatever its name (image_guidance_scale).
    number = only_numbers(takes.forms.get(name, ())) or isinstance(takes.defaults.get(name), (int, float))
    return (number or not _NOT_SENDABLE.search(name)) and name not in (*takes.images, *takes.tensors)


def check_model(values: Mapping[str, Any], options: ServeOptions) -> None:
    """Raise ApiError if a model other than the served one is requested."""
    asked = values.get("model")
    if asked is not None and asked != options.name:
        text = f"there is no model {asked!r} here; this server serves {options.name!r}"
        raise ApiError(404, text, code="model_not_found", param="model")


def check_encoding(values: Mapping[str, Any], takes: PipelineSignature) -> None:
    """Raise ApiError if files cannot be encoded as requested."""
    format_ = values.get("output_format", "auto")
    transparent = takes.image_mode == "RGBA"
    if values.get("background") == "opaque" and transparent:
        text = f"{takes.class_name} makes transparent layers; leave background out"
        raise ApiError(400, text, code="unsupported_value", param="background")
    if format_ == "jpeg" and transparent:
        text = f"{takes.class_name} makes transparent layers, which jpeg cannot hold; use png or webp"
        raise ApiError(400, text, code="unsupported_value", param="output_format")
    if values.get("output_compression", "auto") not in ("auto", 100) and format_ not in ("jpeg", "webp"):
        text = "output_compression is the quality of jpeg and webp; leave it out, or set output_format to one of them"
        raise ApiError(400, text, code="invalid_value", param="output_compression")


def encoding_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the requested encoding of the files of a job."""
    return {name: values[name] for name in ENCODING if values.get(name, "auto") != "auto"}


def arguments(values: Mapping[str, Any], takes: PipelineSignature, options: ServeOptions) -> dict[str, Any]:
    """Return the prompt and parameters under the names of `Omni.generate`, without images and seed. Raises
    ApiError."""
    given = {name: value for name, value in values.items() if name not in ROUTING and name not in (*IMAGES, "seed")}
    if given.get("prompt") == "" and "prompt" not in takes.names:
        del given["prompt"]  # it is a field of all models, and empty if a pipeline takes none
    given = _without_nulls(given, takes)
    _check_extra(given.get("extra_args", {}), takes)
    count, size, seconds = given.pop("n", None), given.pop("size", "auto"), given.pop("seconds", "auto")
    given = _checked(given, takes)
    _put(given, "num_outputs_per_prompt", count, "n")
    if size != "auto":
        width, height = (int(side) for side in size.split("x"))
        _put(given, "width", width, "size")
        _put(given, "height", height, "size")
    if seconds != "auto":
        _put(given, "num_frames", _frames(float(seconds), _fps(given, takes), options.limits), "seconds")
    if options.model.startswith("tiny/"):
        filled = tiny.filled_in(options.model.removeprefix("tiny/"), given)
        given = {**{name: value for name, value in filled.items() if name in takes.names}, **given}
    _check_taken(given, values, takes)
    check_limits(given, takes, options.limits)
    if disagreement := steps_problem(given):
        raise ApiError(400, disagreement, code="invalid_value", param="num_inference_steps")
    suffix = ".mp4" if takes.kind == "video" else f".{values.get('output_format', 'auto')}"
    if problem := side_problem(suffix, given.get("width"), given.get("height")):
        raise ApiError(400, problem, code="too_large", param="size")
    for name in (*takes.most, *takes.refused):
        if problem := takes.limit_problem(name, given.get(name, given.get("extra_args", {}).get(name))):
            raise ApiError(400, problem, code="invalid_value", param=name)
    for name in SIDES:
        if problem := takes.size_problem(name, given.get(name)):
            raise ApiError(400, problem, code="invalid_value", param=name if name in values else "size")
    return given


def _without_nulls(given: Mapping[str, Any], takes: PipelineSignature) -> dict[str, Any]:
    """Leave out arguments of the pipeline that are null, which is their default; for a number or a list, null may have
    a meaning of its own, and becomes an entry of `extra_args`."""
    nulls = [name for name, value in given.items() if value is None]
    kept = {name: value for name, value in given.items() if value is not None}
    default = [takes.defaults.get(name, ()) for name in nulls]
    meant = {
        name: None for name, one in zip(nulls, default, strict=True) if not isinstance(one, (bool, str, type(None)))
    }
    return {**kept, "extra_args": {**meant, **kept.get("extra_args", {})}} if meant else kept


def _checked(given: Mapping[str, Any], takes: PipelineSignature) -> dict[str, Any]:
    """Check the pipeline's own arguments: before the limits, which look at numbers only."""
    own = [name for name in given if name not in field_names()]
    try:
        values = {**given, **{name: checked_value(name, given[name], takes) for name in own}}
        extra = given.get("extra_args", {})
        for name, value in {**extra, **given}.items():
            check_attention(name, value, takes.adapted)
        checked = {name: checked_value(name, value, takes) for name, value in extra.items()}
        if takes.rate_name in {**extra, **given}:
            FRAME_RATE(str(takes.rate_name), {**checked, **values}[takes.rate_name])
    except InputError as error:
        raise from_input_error(error, {*takes.names, *given}) from error
    return {**values, **({"extra_args": checked} if "extra_args" in given else {})}


def _fps(given: Mapping[str, Any], takes: PipelineSignature) -> float:
    """Return the frames per second as given, under our name or the model's own, or the model's default."""
    rate = {**given.get("extra_args", {}), **given}.get(takes.rate_name)
    return float(given.get("fps") or rate or takes.default_fps)


def check_limits(given: Mapping[str, Any], takes: PipelineSignature, limits: RequestLimits) -> None:
    """Raise ApiError for values above the server's limits that the fields alone do not show (`limit_problem`)."""
    for name in ("width", "height"):
        if given.get(name, 1) < 1:
            raise ApiError(
                400, f"size must be at least 1x1, got {name} {given[name]}", code="invalid_value", param="size"
            )
    if problem := limit_problem({**given.get("extra_args", {}), **given}, takes.defaults, limits):
        name, what = problem
        raise ApiError(400, f"{name} {what}", code="too_large", param=name)


def _check_taken(given: Mapping[str, Any], values: Mapping[str, Any], takes: PipelineSignature) -> None:
    for name, value in given.items():
        needless = name == "num_outputs_per_prompt" and value == 1  # one is the default of every pipeline
        if name in takes.choices or name == "extra_args" or needless:
            continue
        shown = name if name in values else _SHOWN_AS[name]
        raise ApiError(400, f"{takes.class_name} takes no {shown}; leave it out", code="invalid_value", param=shown)


_SHOWN_AS = {"num_outputs_per_prompt": "n", "width": "size", "height": "size", "num_frames": "seconds"}


def _put(given: dict[str, Any], name: str, value: Any, shown_as: str) -> None:
    if value is None:
        return
    if given.get(name, value) != value:
        text = f"{shown_as} and {name} disagree ({value} and {given[name]}); give one of them"
        raise ApiError(400, text, code="invalid_value", param=shown_as)
    given[name] = value


def _frames(seconds: float, fps: float, limits: RequestLimits) -> int:
    frames = round(min(seconds * fps, 1e9)) + 1  # infinity cannot be rounded
    if seconds <= 0 or frames > limits.frames:
        text = f"seconds must be more than 0 and at most {(limits.frames - 1) / fps:g} at {fps:g} fps, got {seconds:g}"
        raise ApiError(400, text, code="invalid_value", param="seconds")
    return frames


def _check_extra(extra: Mapping[str, Any], takes: PipelineSignature) -> None:
    for name in extra:
        if name not in takes.names:
            text = f"{takes.class_name} takes no {name!r}; leave extra_args.{name} out"
            raise ApiError(400, text, code="invalid_value", param="extra_args")
        if not _is_sendable(name, takes):
            text = f"extra_args.{name} cannot be given over HTTP; leave it out"
            raise ApiError(400, text, code="invalid_value", param="extra_args")
