"""Qwen-Image in all its forms, LongCat-Image-Edit and Nucleus-Image: a vision-language model is the encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardit.models.tiny.recipes.recipe import Part
from shardit.models.tiny.recipes.vaes import QWEN_VAE, QWEN_VAE_DEEP, QWEN_VAE_DEEP_RGBA
from tests.pipelines import parts, parts_vision
from tests.pipelines.entry import PipelineEntry

_TEXT = 64  # width of Qwen2.5-VL
_NET: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 4,
    "joint_attention_dim": _TEXT,
    "axes_dims_rope": (4, 6, 6),
}


def _vae(part: Part) -> Any:
    return parts.model(part.cls, **part.config)


def _qwen(vae: Part = QWEN_VAE, **changes: Any) -> dict[str, Any]:
    return {
        "scheduler": parts.flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02),
        "vae": _vae(vae),
        "text_encoder": parts_vision.qwen25_vl(),
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        "transformer": parts.model("QwenImageTransformer2DModel", **_NET),
        **changes,
    }


def _edit(vae: Part = QWEN_VAE_DEEP, **changes: Any) -> dict[str, Any]:
    # These work on pictures of a million pixels, hence the 32x autoencoder.
    return _qwen(vae, processor=parts_vision.qwen_processor("Qwen2VLProcessor"), **changes)


def _layered() -> dict[str, Any]:
    net = parts.model("QwenImageTransformer2DModel", **_NET, use_additional_t_cond=True, use_layer3d_rope=True)
    return _edit(QWEN_VAE_DEEP_RGBA, transformer=net)


def _controlled(**changes: Any) -> dict[str, Any]:
    return _qwen(controlnet=parts.model("QwenImageControlNetModel", **{**_NET, "num_layers": 2, **changes}))


def _call(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "dark fog",
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "true_cfg_scale": 4.0,
        "output_type": "np",
        **changes,
    }


def _picture(size: int = 32, mode: str = "RGB") -> Any:
    return parts.picture(size, size, mode=mode)


def _from_picture(**changes: Any) -> dict[str, Any]:
    return _call(**{"image": _picture(), "num_inference_steps": 3, "strength": 0.7, **changes})


def _edited(**changes: Any) -> dict[str, Any]:
    return _call(**{"image": _picture(), "height": 128, "width": 128, **changes})


def _layers() -> dict[str, Any]:
    made = _call(image=_picture(mode="RGBA"), layers=2, resolution=640, cfg_normalize=True, use_en_prompt=True)
    return {key: value for key, value in made.items() if key not in ("height", "width")}


def _qwen21() -> dict[str, Any]:
    vae = parts.model(
        "AutoencoderKLQwenImage21",
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True, True],
        latents_mean=[0.1 * i for i in range(8)],
        latents_std=[1.0 + 0.1 * i for i in range(8)],
    )
    return {
        "scheduler": parts.flow(),
        "vae": vae,
        "text_encoder": parts_vision.qwen3_vl(),
        "processor": parts_vision.qwen_processor("Qwen3VLProcessor", patch_size=16, min_pixels=32**2, max_pixels=64**2),
        "transformer": parts.like("QwenImage21Transformer2DModel", context_in_dim=parts.WIDTH),
    }


def _nucleus() -> dict[str, Any]:
    net = parts.like(
        "NucleusMoEImageTransformer2DModel", in_channels=64, out_channels=16, joint_attention_dim=parts.WIDTH
    )
    return {
        "transformer": net,
        "scheduler": parts.flow(),
        "vae": _vae(QWEN_VAE),
        "text_encoder": parts_vision.qwen3_vl(layers=3),
        "processor": parts_vision.qwen_processor("Qwen3VLProcessor"),
    }


def _nucleus_call() -> dict[str, Any]:
    made = {key: value for key, value in _call(return_index=-2, guidance_scale=4.0).items() if key != "true_cfg_scale"}
    return {**made, "max_sequence_length": 64}


def _longcat_edit() -> dict[str, Any]:
    net = parts.like("LongCatImageTransformer2DModel", in_channels=64, joint_attention_dim=64, pooled_projection_dim=64)
    return {
        "scheduler": parts.flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        "vae": parts.vae(16, (4, 4, 4, 8, 8, 8), shift_factor=0.1),
        "text_encoder": parts_vision.qwen25_vl(),
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        "text_processor": parts_vision.qwen_processor("Qwen2VLProcessor"),
        "transformer": net,
    }


def _longcat_call() -> dict[str, Any]:
    drop = ("height", "width", "true_cfg_scale")
    return {key: value for key, value in _edited(guidance_scale=4.5).items() if key not in drop}


def _entry(name: str, made: Callable[[], dict[str, Any]], arguments: Callable[[], dict[str, Any]]) -> PipelineEntry:
    return PipelineEntry(name, lambda: parts.pipeline(name, **made()), arguments)


ENTRIES: tuple[PipelineEntry, ...] = (
    _entry("QwenImagePipeline", _qwen, _call),
    _entry("QwenImageImg2ImgPipeline", _qwen, _from_picture),
    _entry("QwenImageInpaintPipeline", _qwen, lambda: _from_picture(mask_image=parts.mask(32, 32))),
    _entry("QwenImageEditPipeline", _edit, _edited),
    _entry("QwenImageEditPlusPipeline", _edit, lambda: _edited(image=[_picture(), _picture(48)])),
    _entry(
        "QwenImageEditInpaintPipeline",
        _edit,
        lambda: _edited(mask_image=parts.mask(32, 32), num_inference_steps=3, strength=0.7),
    ),
    _entry("QwenImageLayeredPipeline", _layered, _layers),
    _entry("QwenImageControlNetPipeline", _controlled, lambda: _call(control_image=_picture())),
    _entry(
        "QwenImageControlNetInpaintPipeline",
        lambda: _controlled(extra_condition_channels=4),
        lambda: _call(control_image=_picture(), control_mask=parts.mask(32, 32)),
    ),
    _entry("QwenImage21Pipeline", _qwen21, lambda: _call(image=_picture(mode="RGBA"), output_resolution=64)),
    _entry("NucleusMoEImagePipeline", _nucleus, _nucleus_call),
    _entry("LongCatImageEditPipeline", _longcat_edit, _longcat_call),
)
