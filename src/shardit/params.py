"""Parameters of one generation: the arguments of diffusers' pipelines, with early checks."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from shardit.config import reject_unknown_names
from shardit.errors import InputError
from shardit.settings.checks import NAMED_VALUES, TEXT, matching, number, numbers, whole
from shardit.settings.declare import check_declared, declare, hinted

MAX_SEED = 2**63 - 1
"""Largest seed. torch would also take 64-bit seeds and negative ones (as another name for a positive one), but then
one image would have two seeds, and files and databases that store signed 64-bit numbers could not hold them."""

RANDOM_SEED = -1
"""As a seed: one is drawn, as without a seed."""

# Small enough to type again and to survive any JSON reader.
DRAWN_SEEDS = 2**32
"""Seeds are drawn below this."""

SEED = whole(RANDOM_SEED, MAX_SEED, meaning=f"a whole number from 0 to {MAX_SEED}, or {RANDOM_SEED} for a random one")
FRAME_RATE = number(0.01, 1000)
"""Frame rates that a file can hold and a player show."""

_OUTPUT_TYPE = matching(
    "'pil' (images), 'np' or 'pt' (pixels as numbers) or 'latent' (latents before the VAE), or, of pipelines that "
    "make them, 'mesh', 'text' or 'seq'",
    lambda value: value in ("pil", "latent", "np", "pt", "mesh", "text", "seq"),
)

_argument = functools.partial(declare, None, flag=None)
"""Declares a parameter that has no flag of its own: `--extra` takes it."""

_OF_FAMILIES = (
    *("layers", "resolution", "cfg_normalize", "use_en_prompt", "cfg_normalization", "cfg_truncation"),
    *("enable_cfg_renorm", "cfg_renorm_min", "enable_prompt_rewrite", "skip_guidance_layers"),
    *("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"),
)
"""Arguments of single model families that are taken as keywords, as in vLLM-Omni; they become `extra_args`."""


@hinted("params")
@dataclass(frozen=True, kw_only=True)
class OmniDiffusionSamplingParams:
    """Generation arguments under their diffusers names. None (the default) means the pipeline's own default.

    A value that is wrong for every pipeline raises `InputError` here. A value that this pipeline does not take, or
    refuses (for example, a height that its VAE cannot cut), raises it in `Omni.generate`. Arguments without a field go
    through `extra_args`.
    """

    negative_prompt: str | None = declare(None, "Negative prompt.", TEXT)

    width: int | None = declare(None, "Width in pixels.", whole(1))
    """Pipelines refuse or round a size that their VAE and patches do not divide."""

    height: int | None = declare(None, "Height in pixels.", whole(1))
    """Pipelines refuse or round a size that their VAE and patches do not divide."""

    num_frames: int | None = declare(None, "Number of frames of a video.", whole(1))
    """Wan rounds to 4n + 1."""

    num_inference_steps: int | None = declare(None, "Number of denoising steps.", whole(1))

    guidance_scale: float | None = declare(None, "Guidance scale.", number(0))
    """Batched or distilled, as the pipeline means it."""

    guidance_scale_2: float | None = declare(
        None, "Guidance scale of the second (low-noise) expert. [default: guidance_scale]", number(0)
    )

    true_cfg_scale: float | None = declare(
        None,
        "Scale of classifier-free guidance with the negative prompt, for models with distilled guidance.",
        number(0),
    )

    seed: int | None = declare(None, "Seed, from 0; -1 for a random one. [default: drawn and recorded]", SEED)
    """Seed of a torch CPU generator."""

    fps: float | None = declare(None, "Frames per second of a video. [default: the model's]", FRAME_RATE)
    """Written into the saved file, and given to a model that has an argument for it."""

    num_outputs_per_prompt: int = declare(1, "Number of outputs for each prompt.", whole(1))
    """All are drawn from one generator."""

    prompt_2: str | None = _argument("Prompt of the second text encoder. [default: prompt]", TEXT)

    prompt_3: str | None = _argument("Prompt of the third text encoder. [default: prompt]", TEXT)

    negative_prompt_2: str | None = _argument(
        "Negative prompt of the second text encoder. [default: negative_prompt]", TEXT
    )

    negative_prompt_3: str | None = _argument(
        "Negative prompt of the third text encoder. [default: negative_prompt]", TEXT
    )

    max_sequence_length: int | None = _argument("Longest prompt in tokens.", whole(1))

    sigmas: Sequence[float] | None = _argument(
        "Noise levels of the steps, in place of num_inference_steps.", numbers(number(0))
    )

    timesteps: Sequence[float] | None = _argument(
        "Time steps of the scheduler, in place of num_inference_steps.", numbers(number(0))
    )

    strength: float | Sequence[float] | None = _argument(
        "How far an input image is changed; a list for pipelines with several strengths.",
        numbers(number(0, 1), or_one=True),
    )

    eta: float | None = _argument("Noise added by stochastic schedulers.", number(0))

    guidance_rescale: float | None = _argument(
        "Share by which guided noise is rescaled against over-exposure.", number(0)
    )

    clip_skip: int | None = _argument("Number of last CLIP layers to leave out.", whole(0))

    mu: float | None = _argument("Shift of schedulers with dynamic shifting.", number())

    output_type: str | None = _argument("Form of the result. [default: 'pil']", _OUTPUT_TYPE)
    """Images are in `images` or `frames` of an `Output`, numbers (pixels from 0 to 1) in `latents`; "seq" means
    tokens."""

    attention_kwargs: Mapping[str, Any] | None = _argument(
        "Arguments of the attention processors (LoRA scale).", NAMED_VALUES
    )

    joint_attention_kwargs: Mapping[str, Any] | None = _argument(
        "The same as attention_kwargs, under the name that Flux, SD3, Z-Image, LongCat and Ovis use.",
        NAMED_VALUES,
    )

    extra_args: Mapping[str, Any] = declare(
        dict, "Further arguments of the pipeline by their diffusers names.", NAMED_VALUES, flag=None
    )
    """They are checked against the pipeline's signature; a name with a field of its own is refused."""

    if not TYPE_CHECKING:

        def __init__(self, **given: Any) -> None:
            reject_unknown_names(type(self).__name__, given, [*field_names(), *_OF_FAMILIES])
            extra = {} if given.get("extra_args") is None else given["extra_args"]
            NAMED_VALUES("extra_args", extra)
            of_family = {name: given[name] for name in given if name in _OF_FAMILIES and given[name] is not None}
            for name in extra:
                if name in field_names() or name in of_family:
                    raise InputError(f"extra_args: {name!r} has a field of its own; give it as {name}=... instead")
            # Copied, so that the caller's dict does not change a frozen object later.
            given = {**given, "extra_args": {**extra, **of_family}}
            for item in fields(self):
                object.__setattr__(self, item.name, given.get(item.name, item.default))
            check_declared(self)

    def given(self) -> dict[str, Any]:
        """Return the chosen values: every field that is not None, without `extra_args`."""
        chosen = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra_args"}
        return {name: value for name, value in chosen.items() if value is not None}


def seed_or_drawn(seed: int | None) -> int:
    """Return the given seed; a drawn one for None and -1."""
    return secrets.randbelow(DRAWN_SEEDS) if seed is None or seed == RANDOM_SEED else int(seed)


def field_names() -> list[str]:
    """Names of the fields of `OmniDiffusionSamplingParams`."""
    return [item.name for item in fields(OmniDiffusionSamplingParams)]
