"""What one generation is asked for: the arguments of diffusers' pipelines, checked when they are given."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from shardit.config import reject_unknown_names
from shardit.errors import InputError

MAX_SEED = 2**63 - 1
"""Largest seed. torch would also take 64-bit seeds and negative ones (as another name for a positive one), but then
one picture would have two seeds, and files and databases that store signed 64-bit numbers could not hold them."""

RANDOM_SEED = -1
"""As a seed: one is drawn, as where none is given."""

# Small enough to type again and to survive any JSON reader.
DRAWN_SEEDS = 2**32
"""Seeds are drawn below this."""

Check = Callable[[str, Any], None]


def whole(minimum: int, maximum: int | None = None) -> Check:
    """A check for whole numbers from `minimum` to `maximum`; bools are refused."""

    def check(name: str, value: Any) -> None:
        fits = isinstance(value, Integral) and not isinstance(value, bool)
        if not fits or int(value) < minimum or (maximum is not None and int(value) > maximum):
            limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise InputError(f"{name} must be a whole number {limits}, got {value!r}")

    return check


def number(minimum: float | None = None, maximum: float | None = None, *, above: float | None = None) -> Check:
    """A check for finite numbers within the limits (`above` excludes the limit itself); bools are refused."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"{name} must be a finite number, got {value!r}")
        amount = float(value)
        if above is not None and not amount > above:
            raise InputError(f"{name} must be greater than {above:g}, got {value!r}")
        if minimum is not None and amount < minimum:
            raise InputError(f"{name} must be at least {minimum:g}, got {value!r}")
        if maximum is not None and amount > maximum:
            raise InputError(f"{name} must be at most {maximum:g}, got {value!r}")

    return check


def seed_number(name: str, value: Any) -> None:
    """A check for seeds: whole numbers from 0 to MAX_SEED, or -1 for a random one."""
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or not RANDOM_SEED <= int(value) <= MAX_SEED:
        raise InputError(
            f"{name} must be a whole number from 0 to {MAX_SEED}, or {RANDOM_SEED} for a random one, got {value!r}"
        )


def numbers(each: Check) -> Check:
    """A check for a list that is not empty, every entry of which passes `each`."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
            raise InputError(f"{name} must be a list of numbers that is not empty, got {value!r}")
        for position, entry in enumerate(value):
            each(f"{name}[{position}]", entry)

    return check


def number_or_numbers(each: Check) -> Check:
    """A check for one number, or a list of them that is not empty."""
    listed = numbers(each)
    return lambda name, value: (listed if isinstance(value, (list, tuple)) else each)(name, value)


_FLAG_TEXTS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def text_as_flag(value: Any) -> Any:
    """The bool that a text means, in any case of letters: forms and command lines have texts alone. Other values stay
    as they are."""
    return _FLAG_TEXTS.get(value.strip().lower(), value) if isinstance(value, str) else value


def flag(name: str, value: Any) -> None:
    """A check for bools."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}")


def flag_or_number(name: str, value: Any) -> None:
    """A check for bools and numbers of at least 0."""
    if not isinstance(value, bool):
        number(0)(name, value)


def text(name: str, value: Any) -> None:
    """A check for strings."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {type(value).__name__}")


def named_values(name: str, value: Any) -> None:
    """A check for dicts with string keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name} must be a dict with names as keys, got {value!r}")


def output_type(name: str, value: Any) -> None:
    """A check for the forms in which an `Output` can hold a result."""
    if value not in ("pil", "latent", "np", "pt", "mesh", "text", "seq"):
        raise InputError(
            f"{name} must be 'pil' (pictures), 'np' or 'pt' (pixels as numbers) or 'latent' (latents before the VAE), "
            f"or, of pipelines that make them, 'mesh', 'text' or 'seq', got {value!r}"
        )


def _checked(check: Check, default: Any = None) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class OmniDiffusionSamplingParams:
    """Generation arguments under their diffusers names. None (the default) means the pipeline's own default.

    A value that is wrong for every pipeline raises `InputError` here; one that the pipeline at hand does not take, or
    refuses (a height that its VAE cannot cut, say), raises it in `Omni.generate`. What has no field here goes through
    `extra_args`.
    """

    height: int | None = _checked(whole(1))
    """Pixels. Error: below 1. Pipelines refuse or round what their VAE and patches do not divide."""

    width: int | None = _checked(whole(1))
    """Pixels. Error: below 1. Pipelines refuse or round what their VAE and patches do not divide."""

    num_frames: int | None = _checked(whole(1))
    """Frames of a video. Error: below 1. Wan rounds to 4n + 1."""

    num_inference_steps: int | None = _checked(whole(1))
    """Denoising steps. Error: below 1."""

    guidance_scale: float | None = _checked(number(0))
    """Guidance strength, no unit; batched or distilled, as the pipeline means it. Error: negative, NaN, infinite."""

    guidance_scale_2: float | None = _checked(number(0))
    """Guidance strength of the second (low-noise) expert. None = guidance_scale. Error: as guidance_scale."""

    true_cfg_scale: float | None = _checked(number(0))
    """Guidance strength against the negative prompt, for pipelines that also have a distilled one. Error: as
    guidance_scale."""

    negative_prompt: str | None = _checked(text)
    """What the picture should not show. Error: not a string."""

    prompt_2: str | None = _checked(text)
    """Prompt of the second text encoder. None = prompt. Error: not a string."""

    prompt_3: str | None = _checked(text)
    """Prompt of the third text encoder. None = prompt. Error: not a string."""

    negative_prompt_2: str | None = _checked(text)
    """Negative prompt of the second text encoder. None = negative_prompt. Error: not a string."""

    negative_prompt_3: str | None = _checked(text)
    """Negative prompt of the third text encoder. None = negative_prompt. Error: not a string."""

    num_outputs_per_prompt: int = _checked(whole(1), default=1)
    """Pictures or videos per prompt, all from one generator. Default 1. Error: below 1."""

    seed: int | None = _checked(seed_number)
    """Seed of a torch CPU generator. None or -1 = one is drawn and recorded in the output. Error: outside
    -1..2**63-1."""

    fps: float | None = _checked(number(above=0))
    """Frames per second of a saved video, which a model that has an argument for it is told, too. None = the model's
    own rate. Error: 0, negative, NaN, infinite."""

    max_sequence_length: int | None = _checked(whole(1))
    """Longest prompt in tokens. Error: below 1."""

    sigmas: Sequence[float] | None = _checked(numbers(number(0)))
    """Noise levels of the steps, in place of num_inference_steps. Error: empty, an entry negative or not finite."""

    timesteps: Sequence[float] | None = _checked(numbers(number(0)))
    """Time steps of the scheduler, in place of num_inference_steps. Error: empty, an entry negative or not finite."""

    strength: float | Sequence[float] | None = _checked(number_or_numbers(number(0, 1)))
    """How far an input picture is changed, 0 to 1; a list for pipelines with several. Error: outside that."""

    eta: float | None = _checked(number(0))
    """Noise added by stochastic schedulers, no unit. Error: negative, NaN, infinite."""

    guidance_rescale: float | None = _checked(number(0))
    """Share by which guided noise is rescaled against over-exposure. Error: negative, NaN, infinite."""

    layers: int | None = _checked(whole(1))
    """Layers that a layered pipeline cuts a picture into. Error: below 1."""

    resolution: int | None = _checked(whole(1))
    """Size class of a layered pipeline, in pixels. Error: below 1."""

    cfg_normalize: bool | None = _checked(flag)
    """Qwen-Image-Layered: keep the norm of the guided prediction. Error: not a bool."""

    use_en_prompt: bool | None = _checked(flag)
    """Qwen-Image-Layered: caption the picture in English rather than Chinese. Error: not a bool."""

    cfg_normalization: bool | float | None = _checked(flag_or_number)
    """Z-Image: limit the norm of the guided prediction. Error: neither a bool nor a number of at least 0."""

    cfg_truncation: float | None = _checked(number(0))
    """Z-Image: normalised time (0 to 1) after which guidance stops. Error: negative, NaN, infinite."""

    enable_cfg_renorm: bool | None = _checked(flag)
    """LongCat-Image: rescale the guided prediction. Error: not a bool."""

    cfg_renorm_min: float | None = _checked(number(0))
    """LongCat-Image: lower bound of that rescaling. Error: negative, NaN, infinite."""

    enable_prompt_rewrite: bool | None = _checked(flag)
    """LongCat-Image: let the text encoder rewrite the prompt first. Error: not a bool."""

    clip_skip: int | None = _checked(whole(0))
    """Last CLIP layers to leave out. Error: negative."""

    skip_guidance_layers: Sequence[int] | None = _checked(numbers(whole(0)))
    """Stable Diffusion 3: blocks left out in the extra branch of skip-layer guidance. Error: empty, a negative one."""

    skip_layer_guidance_scale: float | None = _checked(number(0))
    """Stable Diffusion 3: strength of skip-layer guidance. Error: negative, NaN, infinite."""

    skip_layer_guidance_start: float | None = _checked(number(0, 1))
    """Stable Diffusion 3: share of the steps at which skip-layer guidance starts. Error: outside 0..1."""

    skip_layer_guidance_stop: float | None = _checked(number(0, 1))
    """Stable Diffusion 3: share of the steps at which skip-layer guidance stops. Error: outside 0..1."""

    mu: float | None = _checked(number())
    """Shift of schedulers with dynamic shifting. Error: NaN, infinite."""

    output_type: str | None = _checked(output_type)
    """"pil" (default): pictures in `images` or `frames`; "np", "pt" (pixels from 0 to 1) or "latent": numbers in
    `latents`; of pipelines that make them, "mesh", "text" or "seq" (tokens). Error: anything else."""

    attention_kwargs: Mapping[str, Any] | None = _checked(named_values)
    """Passed to the attention processors (LoRA scale). Error: not a dict with string keys."""

    joint_attention_kwargs: Mapping[str, Any] | None = _checked(named_values)
    """The same under the name that Flux, SD3, Z-Image, LongCat and Ovis use. Error: as attention_kwargs."""

    extra_args: Mapping[str, Any] = _checked(named_values, default=None)
    """Further arguments of the pipeline by their diffusers names, passed on as they are. Default {}. Error: not a
    dict, or a name that has a field of its own here."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OmniDiffusionSamplingParams:
        reject_unknown_names(cls.__name__, kwargs, field_names())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Copied, so that the caller's dict does not change a frozen object later.
        given = {} if self.extra_args is None else self.extra_args
        named_values("extra_args", given)
        object.__setattr__(self, "extra_args", dict(given))
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata["check"] in (flag, flag_or_number):
                value = text_as_flag(value)
                object.__setattr__(self, item.name, value)
            if value is not None or item.default is not None:
                item.metadata["check"](item.name, value)
        for name in self.extra_args:
            if name in field_names():
                raise InputError(f"extra_args repeats {name!r}; give it as {name}=... instead")

    def given(self) -> dict[str, Any]:
        """What was chosen: every field that is not None, without `extra_args`."""
        chosen = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra_args"}
        return {name: value for name, value in chosen.items() if value is not None}


def seed_or_drawn(seed: int | None) -> int:
    """The given seed; a drawn one for None and -1."""
    return secrets.randbelow(DRAWN_SEEDS) if seed is None or seed == RANDOM_SEED else int(seed)


def field_names() -> list[str]:
    """Names of the fields of `OmniDiffusionSamplingParams`."""
    return [item.name for item in fields(OmniDiffusionSamplingParams)]
