"""The pipelines that can be trained, as data: the prompts' tensors, the model's call, the grid of sizes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from shardit.errors import UnsupportedError
from shardit.training.diffusion.families import predictions
from shardit.training.diffusion.families.predictions import Predict


@dataclass(frozen=True)
class TrainingFamily:
    """Training of the pipelines of one class.

    pipeline: name of the class. returns: names of what `encode_prompt` returns, in order; None: not for training.
    predict: the call of the model. padded: prompts have lengths of their own, and shorter ones in a batch are filled up
    under a mask; listed: they are handed in as a list. video: samples are clips. first_frame: the first frame is given.
    token: latent pixels along the side of a token. casts: the pipeline hands latents to its VAE in the VAE's own type.
    encoders: all text encoders, if they are small and load a LoRA. shown: arguments of samples.
    """

    pipeline: str
    returns: tuple[str | None, ...]
    predict: Predict
    padded: bool = False
    listed: bool = False
    video: bool = False
    first_frame: bool = False
    token: int = 2
    casts: bool = False
    encoders: tuple[str, ...] = ()
    shown: tuple[tuple[str, Any], ...] = ()


FAMILIES = (
    TrainingFamily("WanPipeline", ("embeds", None), predictions.wan, video=True, casts=True),
    TrainingFamily(
        "WanImageToVideoPipeline", ("embeds", None), predictions.wan_image, video=True, first_frame=True, casts=True
    ),
    TrainingFamily("FluxPipeline", ("embeds", "pooled", None), predictions.flux),
    TrainingFamily("StableDiffusion3Pipeline", ("embeds", None, "pooled", None), predictions.sd3),
    TrainingFamily(
        "QwenImagePipeline",
        ("embeds", "mask"),
        predictions.qwen,
        padded=True,
        casts=True,
        shown=(("negative_prompt", " "),),
    ),
    TrainingFamily("ZImagePipeline", ("embeds", None), predictions.z_image, listed=True, casts=True),
    TrainingFamily(
        "StableDiffusionXLPipeline",
        ("embeds", None, "pooled", None),
        predictions.unet,
        token=1,
        encoders=("text_encoder", "text_encoder_2"),
    ),
    TrainingFamily("StableDiffusionPipeline", ("embeds", None), predictions.unet, token=1, encoders=("text_encoder",)),
)


def family_of(pipeline_class: Any) -> TrainingFamily:
    """Return the family of a pipeline class. Raises UnsupportedError, which names those that can be trained."""
    name = pipeline_class.__name__
    found = next((one for one in FAMILIES if name == one.pipeline), None)
    if found is None:
        known = ", ".join(one.pipeline for one in FAMILIES)
        raise UnsupportedError(f"{name} cannot be trained; these can: {known}")
    return found


def check_model(family: TrainingFamily, pipe: Any) -> None:
    """Raise UnsupportedError for variants of a family's models whose call is another one."""
    if family.first_frame and getattr(pipe, "image_encoder", None) is not None:
        raise UnsupportedError("a model with an image_encoder (Wan 2.1 image to video) cannot be trained; 2.2 can")
    unet = getattr(pipe, "unet", None)
    if unet is not None and unet.config.in_channels != unet.config.out_channels:
        raise UnsupportedError("a UNet that takes more than latents (inpainting) cannot be trained")
    if unet is not None and unet.config.time_cond_proj_dim is not None:
        raise UnsupportedError("a UNet that takes a guidance scale (LCM) cannot be trained")


def call_default(pipeline_class: Any, name: str) -> Any:
    """Return the default of an argument of a pipeline's call; None if it has none."""
    parameter = inspect.signature(pipeline_class.__call__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def grid(family: TrainingFamily, pipe: Any) -> tuple[int, int]:
    """Return the numbers that sides are multiples of, and that frames are one more than a multiple of."""
    scale = spatial_scale(pipe)
    model = next(one for one in (getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")) if one)
    if family.token == 1:  # a UNet halves the latents in each level but the last
        return scale * 2 ** (len(model.config.block_out_channels) - 1), 1
    patch = model.config.get("patch_size", 2)
    token = patch[-1] if isinstance(patch, (list, tuple)) else patch
    return scale * max(token, family.token), int(getattr(pipe, "vae_scale_factor_temporal", 1))


def spatial_scale(pipe: Any) -> int:
    """Return the pixels along the side of a latent pixel."""
    return int(getattr(pipe, "vae_scale_factor_spatial", None) or pipe.vae_scale_factor)
