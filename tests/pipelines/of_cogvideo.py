"""CogVideoX, CogView 3 Plus and CogView 4."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_chroma_bria import call


def cogvideo_vae() -> Any:
    """`AutoencoderKLCogVideoX`: 8 times smaller images, 4 times fewer frames."""
    return parts.model(
        "AutoencoderKLCogVideoX",
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=16,
        sample_width=16,
    )


def cogvideo(channels: int = 4) -> dict[str, Any]:
    """Return the components of the pipelines of CogVideoX."""
    transformer = parts.like(
        "CogVideoXTransformer3DModel",
        in_channels=channels,
        out_channels=4,
        text_embed_dim=parts.WIDTH,
        max_text_seq_length=16,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
    )
    return {
        "transformer": transformer,
        "vae": cogvideo_vae(),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": parts.scheduler("CogVideoXDDIMScheduler"),
    }


def cogview3() -> dict[str, Any]:
    """Return the components of `CogView3PlusPipeline`."""
    return {
        "transformer": parts.like("CogView3PlusTransformer2DModel", text_embed_dim=parts.WIDTH),
        "vae": parts.vae(),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": parts.scheduler("CogVideoXDDIMScheduler"),
    }


def cogview4(channels: int = 4) -> dict[str, Any]:
    """Return the components of the pipelines of CogView 4."""
    transformer = parts.like(
        "CogView4Transformer2DModel", in_channels=channels, out_channels=4, text_embed_dim=parts.WIDTH
    )
    tokenizer = parts.tokenizer("qwen", "qwen3")
    tokenizer.pad_token = "<|endoftext|>"
    return {
        "transformer": transformer,
        "vae": parts.vae(),
        "text_encoder": parts.decoder("GlmModel"),
        "tokenizer": tokenizer,
        "scheduler": parts.flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True),
    }


def _entry(name: str, make: Any = cogvideo, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


def _clip() -> list[Any]:
    return parts.video(9)


ENTRIES = (
    _entry("CogVideoXPipeline", num_frames=9),
    _entry("CogVideoXFunControlPipeline", lambda: cogvideo(8), control_video=_clip),
    _entry("CogVideoXImageToVideoPipeline", lambda: cogvideo(8), image=parts.picture, num_frames=9),
    _entry("CogVideoXVideoToVideoPipeline", video=_clip, strength=0.8, num_inference_steps=3),
    _entry("CogView3PlusPipeline", cogview3),
    _entry("CogView4Pipeline", cogview4),
    _entry("CogView4ControlPipeline", lambda: cogview4(8), control_image=parts.picture),
)
