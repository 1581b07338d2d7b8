"""Components that Stable Diffusion 1.5 and the pipelines derived from it share, and the first entries."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": parts.WIDTH,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
"""Configuration of the UNet: 8 x 8 latents of 4 channels."""


def unet(**changes: Any) -> Any:
    """The UNet."""
    return parts.model("UNet2DConditionModel", **{**UNET, **changes})


def components(**changes: Any) -> dict[str, Any]:
    """Return the components of `StableDiffusionPipeline`; pictures of 16 x 16."""
    return {
        "unet": unet(),
        "vae": parts.vae(),
        "text_encoder": parts.clip_text(),
        "tokenizer": parts.tokenizer("clip"),
        "scheduler": parts.scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        **changes,
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {"prompt": parts.PROMPT, "num_inference_steps": 2, "guidance_scale": 6.0, "output_type": "np", **changes}


ENTRIES = (
    PipelineEntry(
        "StableDiffusionPipeline",
        lambda: parts.pipeline("StableDiffusionPipeline", **components()),
        lambda: call(height=16, width=16),
        fast=True,
    ),
)
