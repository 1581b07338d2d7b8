"""Turns prompts and parameters into requests: plain data that every rank turns into the same pipeline call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shardit.diffusion.loading.diffusers_source import module_of
from shardit.diffusion.loading.required_packages import check_packages
from shardit.diffusion.request.argument_values import check_attention, checked_value
from shardit.diffusion.request.image_arguments import open_images
from shardit.diffusion.request.images import open_image
from shardit.diffusion.request.pipeline_signature import PipelineSignature, is_count
from shardit.diffusion.request.request import Request
from shardit.diffusion.request.result_limits import ResultLimits, limit_problem
from shardit.diffusion.request.step_lists import listed, steps_problem
from shardit.errors import InputError, did_you_mean
from shardit.params import FRAME_RATE, OmniDiffusionSamplingParams, field_names, seed_or_drawn
from shardit.settings.checks import TEXT, text_problem

if TYPE_CHECKING:
    from shardit.diffusion.request.images import ImageSource

# Names with a meaning of their own in a prompt's dict; every other key is a parameter.
_IMAGE_KEYS = ("pil_image", "image")
_PROMPT_KEYS = ("prompt", "extra_args", *_IMAGE_KEYS)
# Fields of the parameters that do not reach the pipeline under their own name.
_OWN_FIELDS = ("num_outputs_per_prompt", "seed", "fps")
# Further arguments of these names would be ignored in favour of these parameters.
_IN_PLACES = {"prompt": "prompt (--prompt)", "image": "pil_image (--image)", "pil_image": "pil_image (--image)"}
_EMBEDDED = ("image_embeds", "image_embeddings")
# What some pipelines take in place of an image or a video that they need.
_IN_PLACE_OF = {
    "mask_image": ("masked_image_latents",),
    "control_mask": ("masked_image_latents",),
    "video": ("latents",),
}
# Arguments of pipelines that shardit sets itself, and their replacements.
_RESERVED = {
    "generator": "give a seed instead",
    "return_dict": "results always come as Output objects",
    "callback_on_step_end": "functions cannot be sent to the ranks; use shardit.parallelize for callbacks",
    "callback_on_step_end_tensor_inputs": "functions cannot be sent to the ranks; use shardit.parallelize",
}

_RARE_FORMS = ("mesh", "text", "seq")
_ADAPTER = "load one into a pipeline of diffusers (load_ip_adapter) and give that to shardit.parallelize"


def build_requests(
    prompts: object,
    params: object,
    *,
    takes: PipelineSignature,
    takes_with_image: PipelineSignature | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    pil_image: object = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> list[Request]:
    """Build the requests of one `Omni.generate` call (which documents the arguments), in order; nothing is started
    here.

    `overrides` apply to every request; a prompt's own keys have precedence. A request with an image uses
    `takes_with_image` if the model has such a second pipeline. Missing seeds are drawn here, so one process must build
    the requests and send them to the others. Raises `InputError`.
    """
    entries = _as_dicts(prompts, prompt)
    chosen = _params_of_each(params, len(entries))
    shared = {**overrides, **_not_none(negative_prompt=negative_prompt, pil_image=pil_image)}
    without_image = {name: value for name, value in shared.items() if name not in _IMAGE_KEYS}
    requests = []
    for index, (entry, of_entry) in enumerate(zip(entries, chosen, strict=True)):
        try:
            inherited = without_image if any(name in entry for name in _IMAGE_KEYS) else shared
            requests.append(_build(index, {**inherited, **entry}, of_entry, takes, takes_with_image))
        except InputError as error:
            if len(entries) == 1:
                raise
            raise type(error)(f"prompts[{index}]: {error}") from error
    return requests


def params_of(params: object, sampling_params_list: object) -> object:
    """Return `params`, or the same under vLLM-Omni's name: there a list has one entry for each stage of a model, so a
    list of one applies to all prompts. Raises InputError if both are given."""
    if sampling_params_list is None:
        return params
    if params is not None:
        raise InputError("params are given twice; give either params or sampling_params_list, not both")
    alone = isinstance(sampling_params_list, (list, tuple)) and len(sampling_params_list) == 1
    return sampling_params_list[0] if alone else sampling_params_list  # pyright: ignore[reportIndexIssue]


def _as_dicts(prompts: object, prompt: object) -> list[dict[str, Any]]:
    if prompts is not None and prompt is not None:
        raise InputError("the prompt is given twice; give either the first argument or prompt=, not both")
    if prompts is None:
        # No prompt at all: valid for a pipeline with embeddings or without a prompt; `_prompt` decides.
        return [_not_none(prompt=prompt)]
    listed = [prompts] if isinstance(prompts, (str, Mapping)) else prompts
    if not isinstance(listed, Sequence) or isinstance(listed, (bytes, bytearray)):
        raise InputError(f"prompts must be a string, a dict or a list of them, got {type(prompts).__name__}")
    if not listed:
        raise InputError("the list of prompts is empty; give at least one prompt")
    entries = []
    for position, entry in enumerate(listed):
        if isinstance(entry, Mapping):
            entries.append(dict(entry))
        elif isinstance(entry, str):
            entries.append({"prompt": entry})
        else:
            raise InputError(f"prompts[{position}] must be a string or a dict, got {type(entry).__name__}")
    return entries


def _params_of_each(params: object, count: int) -> list[OmniDiffusionSamplingParams]:
    if params is None:
        return [OmniDiffusionSamplingParams()] * count
    if isinstance(params, OmniDiffusionSamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or isinstance(params, str):
        raise InputError(f"params must be OmniDiffusionSamplingParams or a list of them, got {type(params).__name__}")
    if len(params) != count:
        raise InputError(f"params has {len(params)} entries for {count} prompts; give one for all or one for each")
    for position, entry in enumerate(params):
        if not isinstance(entry, OmniDiffusionSamplingParams):
            raise InputError(f"params[{position}] must be OmniDiffusionSamplingParams, got {type(entry).__name__}")
    return list(params)


def _build(
    index: int,
    values: Mapping[str, Any],
    base: OmniDiffusionSamplingParams,
    takes: PipelineSignature,
    takes_with_image: PipelineSignature | None,
) -> Request:
    images = _images(values)
    if images and takes_with_image is not None:
        takes = takes_with_image
    params = _merge(base, values, takes)
    _check_taken(params, takes)
    kwargs = {name: value for name, value in params.given().items() if name not in _OWN_FIELDS}
    kwargs.update({name: checked_value(name, value, takes) for name, value in params.extra_args.items()})
    _check_values(kwargs, takes)
    if problem := steps_problem(kwargs):
        raise InputError(problem)
    counted = {**kwargs, "num_outputs_per_prompt": params.num_outputs_per_prompt}
    if excess := limit_problem(counted, takes.defaults, ResultLimits()):
        name, what = excess
        raise InputError(f"{'width x height' if name == 'size' else name} {what}")
    _rename_frames(kwargs, takes)
    if takes.form is not None:
        kwargs.setdefault("output_type", takes.form)
    _set_rate(kwargs, params.fps, takes)
    seed = seed_or_drawn(params.seed)
    if "seed" in takes.names:
        kwargs["seed"] = seed  # it seeds generators of its own
    kwargs.update(open_images(kwargs, takes))
    prompt = _prompt(values, kwargs, takes)
    _check_required(prompt, images, kwargs, takes)
    given = [*kwargs, *([takes.image_name] if images and takes.image_name else [])]
    check_packages(takes.class_name, takes.missing, given)
    return Request(
        index=index,
        pipeline=takes.class_name,
        prompt=prompt,
        kwargs=kwargs,
        images=tuple(open_image(image, takes.image_mode) for image in images),
        image_name=takes.image_name,
        seed=seed,
        num_outputs=int(params.num_outputs_per_prompt),
        count_name=takes.count_name,
        fps=_fps(params, kwargs, takes),
        sample_rate=takes.sample_rate,
        defaults=_defaults(kwargs, takes),
        made_by=takes.made_by,
        images_left_out=_images_left_out(kwargs, images, takes),
    )


def _images_left_out(
    kwargs: Mapping[str, Any], images: Sequence[ImageSource], takes: PipelineSignature
) -> tuple[str, ...]:
    """Return the arguments for images and videos that have not been given."""
    names = takes.images if images or takes.image_name is None else (takes.image_name, *takes.images)
    return tuple(name for name in names if kwargs.get(name) is None and not takes.needs_adapter(name))


def _check_values(kwargs: Mapping[str, Any], takes: PipelineSignature) -> None:
    for name, value in kwargs.items():
        checks = takes.size_problem, takes.tensor_problem, takes.limit_problem
        if problem := next(filter(None, (check(name, value) for check in checks)), None):
            raise InputError(problem)
        if name not in takes.images and (problem := text_problem(value)):  # paths may have any bytes
            raise InputError(f"{name} must be {problem}, got {value!r:.200}")
        check_attention(name, value, takes.adapted)
    form, source = kwargs.get("output_type"), module_of(takes.class_name)
    if form in _RARE_FORMS and source and f'"{form}"' not in source:
        raise InputError(f"{takes.class_name} makes no output_type {form!r}; leave it out")


def _defaults(kwargs: Mapping[str, Any], takes: PipelineSignature) -> dict[str, Any]:
    """Return the defaults of the pipeline, without the number of steps if a list determines it."""
    hidden = "num_inference_steps" if listed(kwargs) else None
    names = [name for name in takes.choices if takes.defaults.get(name) is not None and name != hidden]
    return {name: takes.defaults[name] for name in names}


def _rename_frames(kwargs: dict[str, Any], takes: PipelineSignature) -> None:
    name = takes.frames_name
    if name is None or name == "num_frames" or "num_frames" not in kwargs:
        return
    frames = kwargs.pop("num_frames")
    if kwargs.setdefault(name, frames) != frames:
        raise InputError(f"num_frames and {name} disagree ({frames} and {kwargs[name]}); give one of them")


def _set_rate(kwargs: dict[str, Any], fps: float | None, takes: PipelineSignature) -> None:
    """Set the model's frame rate, which may already be given under the model's own name."""
    name = takes.rate_name
    if name is None:
        return
    if name in kwargs:
        FRAME_RATE(name, kwargs[name])
    value = kwargs.get(name, fps)
    if fps not in (None, value):
        raise InputError(f"fps and {name} disagree ({fps} and {value}); give one of them")
    if value is not None:
        kwargs[name] = _like(value, takes.defaults.get(name))


def _fps(params: OmniDiffusionSamplingParams, kwargs: Mapping[str, Any], takes: PipelineSignature) -> float:
    """Return the frames per second of the file: as given, the frame-rate argument of the model, or its default."""
    if params.fps is not None:
        return float(params.fps)
    rate = kwargs.get(takes.rate_name or "")
    return takes.default_fps if rate is None else float(rate)


def _like(value: float, default: Any) -> float:
    """Convert a number to the type of a default: JSON and command lines do not distinguish 24 and 24.0, but pipelines
    may."""
    if isinstance(default, float):
        return float(value)
    return int(value) if float(value).is_integer() else value


def _images(values: Mapping[str, Any]) -> list[ImageSource]:
    given = [values[name] for name in _IMAGE_KEYS if values.get(name) is not None]
    if len(given) > 1:
        raise InputError("the image is given twice; give either pil_image or image, not both")
    if not given:
        return []
    images = list(given[0]) if isinstance(given[0], (list, tuple)) else [given[0]]
    if not images:
        raise InputError("the list of images is empty; leave it out or give at least one")
    return images


def _merge(
    base: OmniDiffusionSamplingParams, values: Mapping[str, Any], takes: PipelineSignature
) -> OmniDiffusionSamplingParams:
    own = _extra_args_of(values)
    for name in own:
        if name in values and name not in (*_IN_PLACES, *field_names()):
            raise InputError(f"{name} is given twice, by its name and in extra_args; give one of them")
    fields, extra = {}, {**base.extra_args, **own}
    for name, value in values.items():
        if name in field_names() and name != "extra_args":
            fields[name] = value
        elif name not in _PROMPT_KEYS:
            _check_name(name, takes)
            extra[name] = value
    for name, value in extra.items():
        if name in _IN_PLACES:
            raise InputError(f"{name} cannot be among the further arguments; give it as {_IN_PLACES[name]}")
        _check_name(name, takes)
        if callable(value):
            raise InputError(f"{name} is a function, which cannot be sent to the ranks; use shardit.parallelize for it")
    return dataclasses.replace(base, **fields, extra_args=extra)


def _extra_args_of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    extra = values.get("extra_args") or {}
    if not isinstance(extra, Mapping):
        raise InputError(f"extra_args must be a dict with names as keys, got {extra!r}")
    return extra


def _check_name(name: str, takes: PipelineSignature) -> None:
    reserved = "use num_outputs_per_prompt" if is_count(str(name)) else _RESERVED.get(name)
    if reserved is None and takes.needs_adapter(str(name)):
        reserved = f"the model has no IP-Adapter; {_ADAPTER}"
    if reserved is not None:
        raise InputError(f"{name} cannot be given; {reserved}")
    if name not in takes.names and name not in field_names():
        known = takes.choices
        nearest = did_you_mean(str(name), known)
        raise InputError(f"{takes.class_name} takes no {name!r}{nearest}; it takes: {', '.join(known)}")


def _check_taken(params: OmniDiffusionSamplingParams, takes: PipelineSignature) -> None:
    refused = [name for name in params.given() if name not in takes.choices]
    if params.num_outputs_per_prompt == 1 and "num_outputs_per_prompt" in refused:
        refused.remove("num_outputs_per_prompt")  # one is the number of every pipeline
    if refused:
        raise InputError(f"{takes.class_name} takes no {', '.join(refused)}; it takes: {', '.join(takes.choices)}")


def _prompt(values: Mapping[str, Any], kwargs: Mapping[str, Any], takes: PipelineSignature) -> str | None:
    prompt = values.get("prompt")
    if prompt is None:
        if "prompt" in takes.names and kwargs.get("prompt_embeds") is None:
            raise InputError(f'{takes.class_name} needs a prompt; give prompt="..." (it may be empty)')
        return None
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be a string, got {type(prompt).__name__}; give a list of prompts for several")
    TEXT("prompt", prompt)
    if "prompt" not in takes.names:
        raise InputError(f"{takes.class_name} takes no prompt; it takes: {', '.join(takes.choices)}")
    return prompt


def _check_required(
    prompt: str | None, images: Sequence[ImageSource], kwargs: Mapping[str, Any], takes: PipelineSignature
) -> None:
    if images and takes.image_name is None:
        raise InputError(f"{takes.class_name} takes no image; leave it out or use a model that edits images")
    embedded = any(kwargs.get(name) is not None for name in _EMBEDDED if name in takes.names)
    if not images and takes.needs_image and not embedded:
        raise InputError(f"{takes.class_name} needs an image; give pil_image=... (--image on the command line)")
    if len(images) > 1 and takes.one_image:
        raise InputError(f"{takes.class_name} takes one image, got {len(images)}; give one")
    present = {*kwargs, takes.count_name, takes.image_name if images else "", "prompt" if prompt is not None else ""}
    shown = [name for name in takes.needed_images if name not in takes.required]
    lacks = [n for n in shown if all(kwargs.get(name) is None for name in (n, *_IN_PLACE_OF.get(n, ())))]
    needed = [*takes.required, *lacks]
    present -= set(lacks)  # they may have been given as None
    if missing := [name for name in dict.fromkeys(needed) if name not in present]:
        raise InputError(
            f"{takes.class_name} needs {', '.join(missing)}; give it in the prompt's dict or extra_args (--extra)"
        )


def _not_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
