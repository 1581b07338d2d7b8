"""Tiny text-to-image families with `AutoencoderKL`: SD3.5, Flux, Z-Image, LongCat-Image and Ovis-Image."""

from __future__ import annotations

from shardit.models.tiny.recipes.recipe import Recipe, dynamic_shift, flow_euler, transformer
from shardit.models.tiny.recipes.text import (
    CLIP_TOKENIZER,
    HIDDEN,
    QWEN3_ENCODER,
    QWEN3_TOKENIZER,
    QWEN_TOKENIZER,
    QWEN_VL_ENCODER,
    QWEN_VL_PROCESSOR,
    T5_ENCODER,
    T5_TOKENIZER,
    clip,
)
from shardit.models.tiny.recipes.vaes import kl

_SIZE = {"height": 128, "width": 160}
_NEGATIVE = {"negative_prompt": "dark fog"}
_FLUX_VAE = kl(0.3611, 0.1159)
_FLUX_LIKE = {
    "in_channels": 64,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": HIDDEN,
    "axes_dims_rope": [4, 6, 6],
}

_SD35 = Recipe(
    pipeline="StableDiffusion3Pipeline",
    parts={
        "tokenizer": CLIP_TOKENIZER,
        "text_encoder": clip("CLIPTextModelWithProjection", layers=3),
        "tokenizer_2": CLIP_TOKENIZER,
        "text_encoder_2": clip("CLIPTextModelWithProjection", layers=4, act="gelu"),
        "tokenizer_3": T5_TOKENIZER,
        "text_encoder_3": T5_ENCODER,
        "vae": kl(1.5305, 0.0609),
        "scheduler": flow_euler(shift=3.0),
        "transformer": transformer(
            "SD3Transformer2DModel",
            sample_size=16,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=8,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=HIDDEN,
            caption_projection_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=32,
            dual_attention_layers=[0, 1, 2, 3],
            qk_norm="rms_norm",
        ),
        "image_encoder": None,
        "feature_extractor": None,
    },
    call={**_SIZE, **_NEGATIVE, "num_inference_steps": 3, "guidance_scale": 4.5, "max_sequence_length": 48},
)

_FLUX = Recipe(
    pipeline="FluxPipeline",
    parts={
        "tokenizer": CLIP_TOKENIZER,
        "text_encoder": clip("CLIPTextModel", layers=4),
        "tokenizer_2": T5_TOKENIZER,
        "text_encoder_2": T5_ENCODER,
        "vae": _FLUX_VAE,
        "scheduler": dynamic_shift(1.15, shift=3.0),
        "transformer": transformer(
            "FluxTransformer2DModel", **_FLUX_LIKE, pooled_projection_dim=32, guidance_embeds=True
        ),
        "image_encoder": None,
        "feature_extractor": None,
    },
    call={**_SIZE, "num_inference_steps": 3, "guidance_scale": 3.5, "max_sequence_length": 48},
)

_Z_IMAGE = Recipe(
    pipeline="ZImagePipeline",
    parts={
        "tokenizer": QWEN3_TOKENIZER,
        "text_encoder": QWEN3_ENCODER,
        "vae": _FLUX_VAE,
        "scheduler": flow_euler(shift=3.0),
        "transformer": transformer(
            "ZImageTransformer2DModel",
            in_channels=16,
            dim=120,
            n_layers=8,
            n_refiner_layers=2,
            n_heads=5,
            n_kv_heads=5,
            cap_feat_dim=HIDDEN,
            axes_dims=[8, 8, 8],
            axes_lens=[1024, 128, 128],
        ),
    },
    call={**_SIZE, **_NEGATIVE, "num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 128},
)

_LONGCAT_PARTS = {
    "tokenizer": QWEN_TOKENIZER,
    "text_encoder": QWEN_VL_ENCODER,
    "text_processor": QWEN_VL_PROCESSOR,
    "scheduler": dynamic_shift(1.15, shift=3.0),
    "transformer": transformer("LongCatImageTransformer2DModel", **_FLUX_LIKE, pooled_projection_dim=HIDDEN),
}
_LONGCAT = Recipe(
    pipeline="LongCatImagePipeline",
    parts={**_LONGCAT_PARTS, "vae": _FLUX_VAE},
    call={
        **_SIZE,
        **_NEGATIVE,
        "num_inference_steps": 2,
        "guidance_scale": 4.5,
        "enable_prompt_rewrite": False,  # it would generate 512 tokens first
    },
)
# The result always has about 1024 x 1024 pixels, hence the 32x autoencoder.
_LONGCAT_EDIT = Recipe(
    pipeline="LongCatImageEditPipeline",
    parts={**_LONGCAT_PARTS, "vae": kl(0.3611, 0.1159, channels=(4, 4, 4, 8, 8, 8), tile=512)},
    call={**_NEGATIVE, "num_inference_steps": 2, "guidance_scale": 4.5},
    images=1,
)

_OVIS = Recipe(
    pipeline="OvisImagePipeline",
    parts={
        "tokenizer": QWEN3_TOKENIZER,
        "text_encoder": QWEN3_ENCODER,
        "vae": _FLUX_VAE,
        "scheduler": dynamic_shift(1.15, shift=3.0),
        "transformer": transformer("OvisImageTransformer2DModel", **_FLUX_LIKE, out_channels=64),
    },
    call={**_SIZE, **_NEGATIVE, "num_inference_steps": 3, "guidance_scale": 5.0, "max_sequence_length": 64},
)

RECIPES: dict[str, Recipe] = {
    "flux": _FLUX,
    "longcat-image": _LONGCAT,
    "longcat-image-edit": _LONGCAT_EDIT,
    "ovis-image": _OVIS,
    "sd3.5": _SD35,
    "z-image": _Z_IMAGE,
}
