"""Tiny Qwen-Image: text to image, the two editors and the layer splitter."""

from __future__ import annotations

from typing import Any

from shardit.models.tiny.recipes.recipe import Part, Recipe, dynamic_shift, transformer
from shardit.models.tiny.recipes.text import HIDDEN, QWEN_TOKENIZER, QWEN_VL_ENCODER, QWEN_VL_PROCESSOR
from shardit.models.tiny.recipes.vaes import QWEN_VAE, QWEN_VAE_DEEP, QWEN_VAE_DEEP_RGBA

_SCHEDULER = dynamic_shift(0.9, shift_terminal=0.02, time_shift_type="exponential")


def _transformer(**config: Any) -> Part:
    return transformer(
        "QwenImageTransformer2DModel",
        in_channels=64,
        out_channels=16,
        num_layers=8,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=[4, 6, 6],
        **config,
    )


def _parts(vae: Part, **parts: Part | None) -> dict[str, Part | None]:
    text = {"tokenizer": QWEN_TOKENIZER, "text_encoder": QWEN_VL_ENCODER}
    return {**text, "vae": vae, "scheduler": _SCHEDULER, "transformer": _transformer(), **parts}


def _call(steps: int, **more: Any) -> dict[str, Any]:
    return {"negative_prompt": "dark fog", "num_inference_steps": steps, "true_cfg_scale": 4.0, **more}


RECIPES: dict[str, Recipe] = {
    "qwen-image": Recipe(
        pipeline="QwenImagePipeline",
        parts=_parts(QWEN_VAE),
        call=_call(3, height=128, width=160),
    ),
    # The input image is always worked on at 1024 x 1024, hence the 32x autoencoder.
    "qwen-image-edit": Recipe(
        pipeline="QwenImageEditPipeline",
        parts=_parts(QWEN_VAE_DEEP, processor=QWEN_VL_PROCESSOR),
        call=_call(2, height=256, width=320),
        images=1,
    ),
    "qwen-image-edit-2509": Recipe(
        pipeline="QwenImageEditPlusPipeline",
        parts=_parts(QWEN_VAE_DEEP, processor=QWEN_VL_PROCESSOR),
        call=_call(2, height=256, width=320),
        images=2,
    ),
    "qwen-image-layered": Recipe(
        pipeline="QwenImageLayeredPipeline",
        parts=_parts(
            QWEN_VAE_DEEP_RGBA,
            processor=QWEN_VL_PROCESSOR,
            transformer=_transformer(use_additional_t_cond=True, use_layer3d_rope=True),
        ),
        call=_call(2, layers=2, resolution=640, cfg_normalize=True, use_en_prompt=True),
        images=1,
    ),
}
