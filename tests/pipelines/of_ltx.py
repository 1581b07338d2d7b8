"""LTX-Video."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry


def vae(**changes: Any) -> Any:
    """The video autoencoder: 16 times smaller images, 4 times fewer frames."""
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 8,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "decoder_inject_noise": (False, False, False, False, False),
        "upsample_residual": (False, False, False, False),
        "upsample_factor": (1, 1, 1, 1),
        "timestep_conditioning": False,
        "patch_size": 1,
        "patch_size_t": 1,
        "encoder_causal": True,
        "decoder_causal": False,
    }
    return parts.model("AutoencoderKLLTXVideo", **{**config, **changes})


def components(**changes: Any) -> dict[str, Any]:
    """Return the components of `LTXPipeline`."""
    transformer = parts.like("LTXVideoTransformer3DModel", in_channels=8, out_channels=8, caption_channels=parts.WIDTH)
    return {
        "transformer": transformer,
        "vae": vae(),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": parts.flow(),
        **changes,
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "blue",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "max_sequence_length": 16,
        "output_type": "np",
        **changes,
    }


def _conditions() -> Any:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    return [
        LTXVideoCondition(image=parts.picture(32, 32)),
        LTXVideoCondition(video=parts.video(9, 32, 32), frame_index=8),
    ]


def _upsampled() -> dict[str, Any]:
    larger = parts.model(
        "diffusers.pipelines.ltx.modeling_latent_upsampler:LTXLatentUpsamplerModel",
        in_channels=8,
        mid_channels=32,
        num_blocks_per_stage=1,
    )
    return {"vae": vae(), "latent_upsampler": larger}


def _entry(name: str, make: Any = components, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


def _picture() -> Any:
    return parts.picture(32, 32)


ENTRIES = (
    _entry("LTXPipeline", fast=True),
    _entry("LTXImageToVideoPipeline", image=_picture),
    _entry("LTXConditionPipeline", conditions=_conditions, num_frames=17),
    # Windows of 6 frames of latents, of which 2 are of the one before.
    _entry(
        "LTXI2VLongMultiPromptPipeline",
        cond_image=_picture,
        num_frames=33,
        temporal_tile_size=24,
        temporal_overlap=8,
        decode_horizontal_tiles=2,
        decode_vertical_tiles=2,
        decode_overlap=1,
        height=64,
        width=64,
    ),
    PipelineEntry(
        "LTXLatentUpsamplePipeline",
        lambda: parts.pipeline("LTXLatentUpsamplePipeline", **_upsampled()),
        lambda: {"video": parts.video(9, 32, 32), "height": 32, "width": 32, "output_type": "np"},
    ),
)
