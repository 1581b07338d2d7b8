"""Pictures by transformers with an `AutoencoderKL`: SD3, PixArt, Z-Image, LongCat-Image, Ovis-Image, Lumina."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.pipelines import parts, parts_vision
from tests.pipelines.entry import PipelineEntry

SIZE = {"height": 32, "width": 32}
QUICK = {"num_inference_steps": 2, "guidance_scale": 4.5, "output_type": "np"}


def text_call(**changes: Any) -> dict[str, Any]:
    """A picture from text."""
    return {"prompt": parts.PROMPT, "negative_prompt": "dark fog", **SIZE, **QUICK, **changes}


def picture_call(**changes: Any) -> dict[str, Any]:
    """A picture from a picture: two steps of three are done."""
    return text_call(**{"image": parts.picture(32, 32), "num_inference_steps": 3, "strength": 0.7, **changes})


def _mask() -> Any:
    return parts.mask(32, 32)


def _entry(
    name: str,
    made: Callable[[], dict[str, Any]],
    arguments: Callable[[], dict[str, Any]],
    rounded: bool = False,
    **config: Any,
) -> PipelineEntry:
    return PipelineEntry(name, lambda: parts.pipeline(name, **made(), **config), arguments, rounded=rounded)


# --- Stable Diffusion 3 -------------------------------------------------------------------------------------------


def sd3(channels: int = 4) -> dict[str, Any]:
    net = parts.like(
        "SD3Transformer2DModel",
        num_layers=5,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
        in_channels=channels,
        out_channels=channels,
    )
    return {
        "transformer": net,
        "scheduler": parts.flow(shift=3.0),
        "vae": parts.vae(channels, shift_factor=0.06),
        "text_encoder": parts.clip_text(projects=True),
        "tokenizer": parts.tokenizer("clip"),
        "text_encoder_2": parts.clip_text(projects=True),
        "tokenizer_2": parts.tokenizer("clip"),
        "text_encoder_3": parts.t5(width=64),
        "tokenizer_3": parts.tokenizer("t5"),
    }


_SHORT = {"max_sequence_length": 32}
_WORDS = {"max_sequence_length": 16}
_LAYERS = {"pag_applied_layers": ["blocks.3"]}

_SD3_ENTRIES = (
    _entry("StableDiffusion3Pipeline", sd3, lambda: text_call(**_SHORT)),
    _entry("StableDiffusion3Img2ImgPipeline", sd3, lambda: picture_call(**_SHORT)),
    _entry(
        "StableDiffusion3InpaintPipeline",
        lambda: sd3(16),
        lambda: picture_call(mask_image=_mask(), **_SHORT),
    ),
    _entry("StableDiffusion3PAGPipeline", sd3, lambda: text_call(pag_scale=2.0, **_SHORT), **_LAYERS),
    _entry("StableDiffusion3PAGImg2ImgPipeline", sd3, lambda: picture_call(pag_scale=2.0, **_SHORT), **_LAYERS),
)

# --- PixArt -------------------------------------------------------------------------------------------------------


def _pixart() -> dict[str, Any]:
    net = parts.model(
        "PixArtTransformer2DModel",
        sample_size=8,
        num_layers=5,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=parts.WIDTH,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    )
    return {
        "tokenizer": parts.tokenizer("t5"),
        "text_encoder": parts.t5(),
        "vae": parts.vae(),
        "transformer": net,
        "scheduler": parts.scheduler("DPMSolverMultistepScheduler"),
    }


def _plain_words(**more: Any) -> dict[str, Any]:
    return text_call(use_resolution_binning=False, clean_caption=False, **_WORDS, **more)


_PIXART_ENTRIES = (
    _entry("PixArtAlphaPipeline", _pixart, _plain_words),
    _entry("PixArtSigmaPipeline", _pixart, _plain_words),
    _entry("PixArtSigmaPAGPipeline", _pixart, lambda: _plain_words(pag_scale=2.0), **_LAYERS),
)

# --- Z-Image ------------------------------------------------------------------------------------------------------

_QWEN3 = {"bos_token_id": 0, "eos_token_id": 2}


def qwen3() -> dict[str, Any]:
    """Qwen3 and its tokenizer."""
    return {"tokenizer": parts.tokenizer("qwen", "qwen3"), "text_encoder": parts.decoder("Qwen3Model", **_QWEN3)}


def _z_image(**changes: Any) -> dict[str, Any]:
    sizes = {"in_channels": 4, "cap_feat_dim": parts.WIDTH, "axes_lens": [512, 64, 64], "n_layers": 4}
    return {
        "scheduler": parts.flow(shift=3.0),
        "vae": parts.vae(shift_factor=0.1),
        **qwen3(),
        "transformer": parts.like("ZImageTransformer2DModel", **{**sizes, **changes}),
    }


def _z_omni() -> dict[str, Any]:
    import transformers

    seen = parts.text_model(
        "Siglip2VisionModel",
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_patches=16,
        patch_size=8,
    )
    made = _z_image(siglip_feat_dim=12)
    made["vae"].to(torch.bfloat16)  # the pipeline encodes pictures in no other
    return {
        **made,
        "siglip": seen,
        "siglip_processor": transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
    }


def _z_control(channels: int) -> dict[str, Any]:
    sizes = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "control_in_dim": channels}
    net = parts.model(
        "ZImageControlNetModel",
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0],
        **sizes,
    )
    return {**_z_image(), "controlnet": net}


_Z_SHORT = {"max_sequence_length": 32}
_WORDS = {"max_sequence_length": 16}

_Z_ENTRIES = (
    _entry("ZImagePipeline", _z_image, lambda: text_call(**_Z_SHORT)),
    _entry("ZImageImg2ImgPipeline", _z_image, lambda: picture_call(**_Z_SHORT)),
    _entry("ZImageInpaintPipeline", _z_image, lambda: picture_call(mask_image=_mask(), **_Z_SHORT)),
    _entry(  # it takes the VAE in bfloat16
        "ZImageOmniPipeline", _z_omni, lambda: text_call(image=[parts.picture(64, 64)], **_Z_SHORT), rounded=True
    ),
    _entry(
        "ZImageControlNetPipeline",
        lambda: _z_control(4),
        lambda: text_call(control_image=parts.picture(32, 32), **_Z_SHORT),
    ),
    _entry(
        "ZImageControlNetInpaintPipeline",
        lambda: _z_control(9),
        lambda: text_call(
            image=parts.picture(32, 32), mask_image=_mask(), control_image=parts.picture(32, 32), **_Z_SHORT
        ),
    ),
)

# --- LongCat and Ovis ---------------------------------------------------------------------------------------------


def _shifting(**config: Any) -> Any:
    dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    return parts.flow(**dynamic, base_shift=0.5, max_shift=1.15, **config)


def _longcat() -> dict[str, Any]:
    net = parts.like("LongCatImageTransformer2DModel", in_channels=64, joint_attention_dim=64, pooled_projection_dim=64)
    return {
        "scheduler": _shifting(),
        "vae": parts.vae(16, shift_factor=0.1),
        "text_encoder": parts_vision.qwen25_vl(),
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        "text_processor": parts_vision.qwen_processor("Qwen2VLProcessor"),
        "transformer": net,
    }


def _ovis() -> dict[str, Any]:
    net = parts.like("OvisImageTransformer2DModel", in_channels=16, out_channels=16, joint_attention_dim=parts.WIDTH)
    return {"scheduler": _shifting(), "vae": parts.vae(shift_factor=0.1), **qwen3(), "transformer": net}


# --- Lumina -------------------------------------------------------------------------------------------------------


def gemma2(**changes: Any) -> dict[str, Any]:
    """Gemma 2 and a tokenizer."""
    config = {"query_pre_attn_scalar": 16, "sliding_window": 64, "pad_token_id": 0, **changes}
    return {"tokenizer": parts.tokenizer("t5"), "text_encoder": parts.decoder("Gemma2Model", **config)}


def _lumina() -> dict[str, Any]:
    net = parts.model(
        "LuminaNextDiT2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        ffn_dim_multiplier=1,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=parts.WIDTH,
        scaling_factor=1.0,
    )
    return {"transformer": net, "scheduler": parts.flow(), "vae": parts.vae(), **gemma2()}


def _lumina2() -> dict[str, Any]:
    net = parts.like("Lumina2Transformer2DModel", num_kv_heads=2, cap_feat_dim=parts.WIDTH)
    return {"transformer": net, "scheduler": parts.flow(), "vae": parts.vae(shift_factor=0.1), **gemma2()}


ENTRIES: tuple[PipelineEntry, ...] = (
    *_SD3_ENTRIES,
    *_PIXART_ENTRIES,
    *_Z_ENTRIES,
    _entry("LongCatImagePipeline", _longcat, lambda: text_call(enable_prompt_rewrite=False)),
    _entry("OvisImagePipeline", _ovis, lambda: text_call(max_sequence_length=64)),
    _entry("LuminaPipeline", _lumina, lambda: text_call(clean_caption=False, height=64, width=64, **_WORDS)),
    _entry("Lumina2Pipeline", _lumina2, lambda: text_call(**_WORDS)),
)
