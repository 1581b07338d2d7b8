"""FLUX.1 and what is derived from it."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry


def transformer(**changes: Any) -> Any:
    """The transformer, for packed latents of 4 channels."""
    config = {"in_channels": 16, "joint_attention_dim": parts.WIDTH, "pooled_projection_dim": parts.WIDTH}
    return parts.like("FluxTransformer2DModel", **{**config, **changes})


def components(**changes: Any) -> dict[str, Any]:
    """What `FluxPipeline` is made of."""
    return {
        "transformer": transformer(),
        "vae": parts.vae(shift_factor=0.1, scaling_factor=1.2, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": parts.clip_text(),
        "tokenizer": parts.tokenizer("clip"),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": parts.tokenizer("t5"),
        "scheduler": parts.flow(),
        **changes,
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "output_type": "np",
        **changes,
    }


ENTRIES = (
    PipelineEntry(
        "FluxPipeline",
        lambda: parts.pipeline("FluxPipeline", **components()),
        lambda: call(negative_prompt="blue", true_cfg_scale=3.0),
        fast=True,
    ),
)
