"""Video models with T5: Allegro, AnyFlow, ChronoEdit, EasyAnimate, Helios, Latte."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry


def allegro() -> dict[str, Any]:
    """Return the components of `AllegroPipeline`."""
    vae = parts.model(
        "AutoencoderKLAllegro",
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_size=64,
    )
    vae.enable_tiling()  # it can do nothing else
    transformer = parts.like(
        "AllegroTransformer3DModel", caption_channels=parts.WIDTH, sample_width=4, sample_height=4, sample_frames=2
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": parts.scheduler("DDIMScheduler"),
    }


def wan(transformer: Any, **changes: Any) -> dict[str, Any]:
    """A transformer with Wan's autoencoder and text encoder."""
    return {
        "transformer": transformer,
        "vae": parts.wan_vae(),
        "text_encoder": parts.t5("UMT5EncoderModel"),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": parts.flow(),
        **changes,
    }


def _anyflow(cls: str, **changes: Any) -> dict[str, Any]:
    sizes = {"in_channels": 16, "out_channels": 16, "text_dim": parts.WIDTH}
    return wan(parts.like(cls, **sizes, **changes), scheduler=parts.scheduler("FlowMapEulerDiscreteScheduler"))


def _chronoedit() -> dict[str, Any]:
    sizes = {"in_channels": 2 * 16 + 4, "out_channels": 16, "text_dim": parts.WIDTH}
    image = {"image_dim": parts.WIDTH, "added_kv_proj_dim": 32}
    return wan(
        parts.like("ChronoEditTransformer3DModel", **sizes, **image),
        image_encoder=parts.clip_vision(projects=False),
        image_processor=parts.clip_pictures(),
    )


def _helios(**changes: Any) -> dict[str, Any]:
    transformer = parts.like("HeliosTransformer3DModel", in_channels=16, out_channels=16, text_dim=parts.WIDTH)
    return wan(
        transformer, scheduler=parts.scheduler("HeliosScheduler", **{"stages": 1, "stage_range": [0, 1], **changes})
    )


def _pyramid() -> dict[str, Any]:
    return _helios(stages=2, stage_range=[0, 0.5, 1])


def _easyanimate(channels: int) -> dict[str, Any]:
    vae = parts.model(
        "AutoencoderKLMagvit",
        down_block_types=("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
        up_block_types=("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    vae.register_to_config(cache_mag_vae=True)  # the inpainting pipeline reads it
    transformer = parts.like(
        "EasyAnimateTransformer3DModel", in_channels=channels, out_channels=4, text_embed_dim=parts.WIDTH
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = parts.text_model(
        "Qwen2VLForConditionalGeneration",
        text_config={**parts.DECODER, "num_hidden_layers": 4, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": parts.WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text,
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        "scheduler": parts.flow(),
    }


def _latte() -> dict[str, Any]:
    transformer = parts.like(
        "LatteTransformer3DModel", caption_channels=parts.WIDTH, out_channels=8, video_length=2, sample_size=8
    )
    return {
        "transformer": transformer,
        "vae": parts.vae(),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": parts.scheduler("DDIMScheduler"),
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "blue",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "output_type": "np",
        **changes,
    }


def _entry(name: str, make: Any, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


def _square() -> Any:
    return parts.picture(32, 32)


CLEAN = {"clean_caption": False}
SHORT = {"max_sequence_length": 16}
WINDOW: dict[str, Any] = {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 2, "height": 32, "width": 32}

ENTRIES = (
    _entry("AllegroPipeline", allegro, num_frames=24, height=64, width=64, **CLEAN, **SHORT),
    _entry("AnyFlowPipeline", lambda: _anyflow("AnyFlowTransformer3DModel"), num_frames=9, **SHORT),
    _entry(
        "AnyFlowFARPipeline",
        lambda: _anyflow("AnyFlowFARTransformer3DModel"),
        num_frames=13,
        height=64,
        width=64,
        chunk_partition=[2, 2],
        **SHORT,
    ),
    _entry("ChronoEditPipeline", _chronoedit, image=parts.picture, num_frames=5, **SHORT),
    _entry("HeliosPipeline", _helios, num_frames=9, **WINDOW, **SHORT),
    parts.entry(
        "HeliosPyramidPipeline",
        _pyramid,
        lambda **c: {k: v for k, v in call(**c).items() if k != "num_inference_steps"},
        num_frames=9,
        pyramid_num_inference_steps_list=[2, 2],
        **WINDOW,
        **SHORT,
    ),
    _entry("EasyAnimatePipeline", lambda: _easyanimate(4), num_frames=5),
    _entry(
        "EasyAnimateControlPipeline", lambda: _easyanimate(8), num_frames=5, control_video=lambda: parts.tensor_video(5)
    ),
    _entry(
        "EasyAnimateInpaintPipeline",
        lambda: _easyanimate(9),
        num_frames=5,
        video=lambda: parts.tensor_video(5),
        mask_video=lambda: parts.tensor_video(5, channels=1).round(),
    ),
    _entry("LattePipeline", _latte, video_length=2, **CLEAN),
)
