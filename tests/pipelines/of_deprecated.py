"""Pipelines that diffusers keeps as deprecated and that work over the components of others."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_animatediff import animated
from tests.pipelines.of_latent_diffusion import vq
from tests.pipelines.of_pixels import pixel_unet
from tests.pipelines.of_stable_diffusion_base import UNET, call, components, unet


def plain(**changes: Any) -> dict[str, Any]:
    """Components of the first pipelines, which take no image encoder."""
    return {k: v for k, v in components(**changes).items() if k != "image_encoder"}


def _video() -> dict[str, Any]:
    config = {
        **UNET,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    made = {k: v for k, v in components().items() if k in names}
    return {**made, "unet": parts.model("UNet3DConditionModel", **config)}


def xs(**changes: Any) -> Any:
    """A ControlNet-XS for a UNet with linear projections."""
    config: dict[str, Any] = {
        "conditioning_embedding_out_channels": (8, 16),
        "block_out_channels": (8, 16),
        "base_block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "num_attention_heads": 2,
        "cross_attention_dim": parts.WIDTH,
        "sample_size": 8,
    }
    return parts.model("ControlNetXSAdapter", **{**config, **changes})


def _xs() -> dict[str, Any]:
    return plain(unet=unet(use_linear_projection=True), controlnet=xs())


def _gligen() -> dict[str, Any]:
    return plain(unet=unet(attention_type="gated", cross_attention_dim=parts.WIDTH))


def amused() -> dict[str, Any]:
    """Return the components of the pipelines of aMUSEd."""
    transformer = parts.like(
        "UVit2DModel",
        cond_embed_dim=parts.WIDTH,
        encoder_hidden_size=parts.WIDTH,
        micro_cond_embed_dim=5 * 8,
        codebook_size=24,
        vocab_size=32,
    )
    return {
        "transformer": transformer,
        "vqvae": vq(latent_channels=8, num_vq_embeddings=24, vq_embed_dim=8, lookup_from_codebook=True),
        "text_encoder": parts.clip_text(projects=True),
        "tokenizer": parts.tokenizer("clip"),
        "scheduler": parts.scheduler("AmusedScheduler", mask_token_id=31),
    }


def _unclip(image: bool = False) -> dict[str, Any]:
    project = parts.model(
        "diffusers.pipelines.deprecated.unclip.text_proj:UnCLIPTextProjModel",
        clip_embeddings_dim=parts.WIDTH,
        time_embed_dim=64,
        cross_attention_dim=parts.WIDTH,
    )
    decoder = parts.model(
        "UNet2DConditionModel",
        sample_size=8,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=parts.WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )

    def larger() -> Any:
        kinds = {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}
        return pixel_unet(in_channels=6, out_channels=3, **kinds)

    def noise(**config: Any) -> Any:
        return parts.scheduler("UnCLIPScheduler", **config)

    from tests.pipelines.of_kandinsky import prior

    made: dict[str, Any] = {
        "decoder": decoder,
        "text_encoder": parts.clip_text(projects=True),
        "tokenizer": parts.tokenizer("clip"),
        "text_proj": project,
        "super_res_first": larger(),
        "super_res_last": larger(),
        "decoder_scheduler": noise(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": noise(variance_type="fixed_small_log", prediction_type="epsilon"),
    }
    if image:
        return {**made, "image_encoder": parts.clip_vision(), "feature_extractor": parts.clip_pictures()}
    return {**made, "prior": prior()["prior"], "prior_scheduler": noise(prediction_type="sample", clip_sample_range=5)}


def _unclip_call(**changes: Any) -> dict[str, Any]:
    return {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "output_type": "np", **changes}


def _pixels(scheduler: str, **config: Any) -> dict[str, Any]:
    return {"unet": pixel_unet(), "scheduler": parts.scheduler(scheduler, **config)}


def _steps(**changes: Any) -> dict[str, Any]:
    return {"num_inference_steps": 2, "output_type": "np", **changes}


def _entry(name: str, make: Any = plain, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


SIZE = {"height": 16, "width": 16}
NEGATIVE = {"negative_prompt": "blue"}
FROM_TEXT: dict[str, Any] = {**SIZE, **NEGATIVE}

ENTRIES = (
    _entry("SemanticStableDiffusionPipeline", editing_prompt=["a dog"], edit_warmup_steps=0, **FROM_TEXT),
    _entry(
        "StableDiffusionGLIGENPipeline",
        _gligen,
        gligen_phrases=["cat"],
        gligen_boxes=[[0.1, 0.1, 0.9, 0.9]],
        **FROM_TEXT,
    ),
    _entry("StableDiffusionPanoramaPipeline", components, **{**FROM_TEXT, "height": 128, "width": 144}),
    _entry("StableDiffusionPipelineSafe", components, sld_warmup_steps=0, sld_guidance_scale=100, **FROM_TEXT),
    _entry("StableDiffusionSAGPipeline", components, **FROM_TEXT),
    _entry(
        "CycleDiffusionPipeline",
        source_prompt="a dog",
        image=parts.picture,
        num_inference_steps=3,
        source_guidance_scale=1,
    ),
    _entry("TextToVideoSDPipeline", _video, num_frames=3, **FROM_TEXT),
    _entry("VideoToVideoSDPipeline", _video, video=lambda: parts.video(3), num_inference_steps=3, strength=0.8),
    _entry("StableDiffusionControlNetXSPipeline", _xs, image=parts.picture, **FROM_TEXT),
    _entry(
        "PIAPipeline",
        lambda: animated(unet=unet(attention_head_dim=(2, 2), in_channels=9)),
        image=parts.picture,
        num_frames=3,
        **FROM_TEXT,
    ),
    _entry("AmusedPipeline", amused, **FROM_TEXT),
    parts.entry("UnCLIPPipeline", _unclip, _unclip_call, prompt=parts.PROMPT, prior_num_inference_steps=2),
    parts.entry("UnCLIPImageVariationPipeline", lambda: _unclip(image=True), _unclip_call, image=parts.picture),
    parts.entry(
        "LDMPipeline",
        lambda: {"unet": pixel_unet(), "vqvae": vq(), "scheduler": parts.scheduler("DDIMScheduler")},
        _steps,
    ),
    parts.entry("PNDMPipeline", lambda: _pixels("PNDMScheduler", skip_prk_steps=True), _steps, num_inference_steps=4),
    parts.entry(
        "RePaintPipeline",
        lambda: _pixels("RePaintScheduler"),
        _steps,
        image=lambda: parts.picture(32, 32),
        mask_image=lambda: parts.mask(32, 32),
        num_inference_steps=3,
        jump_length=1,
        jump_n_sample=2,
    ),
    parts.entry("ScoreSdeVePipeline", lambda: _pixels("ScoreSdeVeScheduler"), _steps),
    parts.entry("KarrasVePipeline", lambda: _pixels("KarrasVeScheduler"), _steps),
    parts.entry(
        "DanceDiffusionPipeline",
        lambda: {
            "unet": parts.like("UNet1DModel", sample_size=256, sample_rate=16000),
            "scheduler": parts.scheduler("IPNDMScheduler"),
        },
        lambda **changes: {"num_inference_steps": 2, **changes},
        audio_length_in_s=0.016,
    ),
)
