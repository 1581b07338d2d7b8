"""Latent consistency models and the first latent diffusion."""

from __future__ import annotations

from typing import Any

from shardit.models.tiny.words import VOCAB
from tests.pipelines import parts
from tests.pipelines.of_pixels import pixel_unet
from tests.pipelines.of_stable_diffusion_base import call, components, unet


def _consistent() -> dict[str, Any]:
    return components(unet=unet(time_cond_proj_dim=16), scheduler=parts.scheduler("LCMScheduler"))


def _first() -> dict[str, Any]:
    encoder = parts.text_model(
        "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion:LDMBertModel",
        vocab_size=VOCAB,
        encoder_layers=2,
        encoder_ffn_dim=48,
        encoder_attention_heads=2,
        head_dim=16,
        d_model=parts.WIDTH,
        dropout=0.0,
    )
    return {
        "unet": unet(),
        "vqvae": parts.vae(),
        "bert": encoder,
        "tokenizer": parts.tokenizer("t5", length=77),
        "scheduler": parts.scheduler("DDIMScheduler"),
    }


def vq(**changes: Any) -> Any:
    """A quantised autoencoder: pictures twice as large as latents of 3 channels."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 3,
    }
    return parts.model("VQModel", **{**config, **changes})


def _larger() -> dict[str, Any]:
    return {"unet": pixel_unet(in_channels=6), "vqvae": vq(), "scheduler": parts.scheduler("DDIMScheduler")}


def _steps(**changes: Any) -> dict[str, Any]:
    return {"num_inference_steps": 2, "output_type": "np", **changes}


ENTRIES = (
    parts.entry("LatentConsistencyModelPipeline", _consistent, call, height=16, width=16),
    parts.entry("LatentConsistencyModelImg2ImgPipeline", _consistent, call, image=parts.picture, num_inference_steps=4),
    parts.entry("LDMTextToImagePipeline", _first, call, height=64, width=64),
    parts.entry("LDMSuperResolutionPipeline", _larger, _steps, image=lambda: parts.picture(32, 32)),
)
