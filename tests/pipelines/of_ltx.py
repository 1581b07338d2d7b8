"""LTX-Video."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry


def vae(**changes: Any) -> Any:
    """The video autoencoder: 16 times smaller pictures, 4 times fewer frames."""
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
    """What `LTXPipeline` is made of."""
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


ENTRIES = (PipelineEntry("LTXPipeline", lambda: parts.pipeline("LTXPipeline", **components()), lambda: call()),)
