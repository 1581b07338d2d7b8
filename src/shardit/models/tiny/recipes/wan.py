"""Tiny Wan 2.2: text to video and image to video with two experts, and the single-expert TI2V."""

from __future__ import annotations

from typing import Any

from shardit.models.tiny.recipes.recipe import Part, Recipe, transformer
from shardit.models.tiny.recipes.text import HIDDEN, T5_TOKENIZER, UMT5_ENCODER
from shardit.models.tiny.recipes.vaes import WAN_VAE, WAN_VAE_TI2V


def _expert(heads: int, head_dim: int, channels: int, out: int) -> Part:
    return transformer(
        "WanTransformer3DModel",
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=out,
        text_dim=HIDDEN,
        freq_dim=64,
        ffn_dim=2 * heads * head_dim,
        num_layers=8,
        rope_max_seq_len=256,
    )


def _scheduler(flow_shift: float) -> Part:
    return Part(
        "scheduler",
        "diffusers",
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift},
    )


def _parts(vae: Part, flow_shift: float, **parts: Part | None) -> dict[str, Part | None]:
    text = {"tokenizer": T5_TOKENIZER, "text_encoder": UMT5_ENCODER}
    return {**text, "vae": vae, "scheduler": _scheduler(flow_shift), **parts}


def _call(height: int, width: int, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "negative_prompt": "dark fog",
        "height": height,
        "width": width,
        "num_frames": 9,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "max_sequence_length": 32,
        **more,
    }


_T2V_EXPERT = _expert(heads=4, head_dim=16, channels=16, out=16)
# latents, the mask of given frames (4 per latent frame) and the encoded image
_I2V_EXPERT = _expert(heads=3, head_dim=24, channels=16 + 4 + 16, out=16)

RECIPES: dict[str, Recipe] = {
    "wan2.2-t2v": Recipe(
        pipeline="WanPipeline",
        config={"boundary_ratio": 0.875},
        parts=_parts(WAN_VAE, 3.0, transformer=_T2V_EXPERT, transformer_2=_T2V_EXPERT),
        call=_call(96, 128, 4, guidance_scale_2=3.0),
    ),
    "wan2.2-ti2v": Recipe(
        pipeline="WanPipeline",
        config={"boundary_ratio": None, "expand_timesteps": True},
        parts=_parts(WAN_VAE_TI2V, 5.0, transformer=_expert(4, 16, 48, 48), transformer_2=None),
        call=_call(128, 192, 3),
    ),
    "wan2.2-i2v": Recipe(
        pipeline="WanImageToVideoPipeline",
        config={"boundary_ratio": 0.9, "expand_timesteps": False},
        parts=_parts(
            WAN_VAE,
            3.0,
            transformer=_I2V_EXPERT,
            transformer_2=_I2V_EXPERT,
            image_encoder=None,
            image_processor=None,
        ),
        call=_call(96, 128, 4, guidance_scale_2=3.0),
        images=1,
    ),
}
