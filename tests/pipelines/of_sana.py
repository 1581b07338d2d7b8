"""Sana, its videos and its world model, and PRX: pictures by linear attention with a deep autoencoder and Gemma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_ltx2 import video_vae
from tests.pipelines.of_picture_dit import gemma2
from tests.support import survey_models


def deep_vae() -> Any:
    """`AutoencoderDC`, half as large."""
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_block_types"] = ("ResBlock", "EfficientViTBlock")
        sides[f"{side}_block_out_channels"] = (8, 8)
        sides[f"{side}_qkv_multiscales"] = ((), (5,))
        sides[f"{side}_layers_per_block"] = (1, 1)
    return parts.model(
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=2,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
        **sides,
    )


def _sana(**changes: Any) -> dict[str, Any]:
    return {
        **gemma2(),
        "vae": deep_vae(),
        "transformer": parts.like("SanaTransformer2DModel", caption_channels=parts.WIDTH),
        "scheduler": parts.flow(shift=3.0),
        **changes,
    }


def _sprint() -> dict[str, Any]:
    net = parts.like(
        "SanaTransformer2DModel", caption_channels=parts.WIDTH, guidance_embeds=True, qk_norm="rms_norm_across_heads"
    )
    return _sana(transformer=net, scheduler=parts.scheduler("SCMScheduler"))


def _controlled() -> dict[str, Any]:
    config = dict(parts.like("SanaTransformer2DModel", caption_channels=parts.WIDTH).config)
    names = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads",
             "cross_attention_head_dim", "cross_attention_dim", "caption_channels", "sample_size")  # fmt: skip
    sizes = {name: config[name] for name in names}
    return _sana(controlnet=parts.model("SanaControlNetModel", **sizes, num_layers=2))


def _call(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "dark fog",
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "guidance_scale": 4.5,
        "max_sequence_length": 16,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
        "output_type": "np",
        **changes,
    }


def _without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in names}


def _distilled(**changes: Any) -> dict[str, Any]:
    return _without(_call(**changes), "negative_prompt")


def _video() -> dict[str, Any]:
    net = parts.like("SanaVideoTransformer3DModel", in_channels=16, out_channels=16, caption_channels=parts.WIDTH)
    return _sana(vae=parts.wan_vae(), transformer=net)


def _video_call(**changes: Any) -> dict[str, Any]:
    return _without(_call(frames=9, **changes), "complex_human_instruction")


def _world() -> dict[str, Any]:
    # Smaller weights than elsewhere: its blocks make differences of one bit a hundred times larger.
    net = survey_models.randomise(
        parts.like("SanaWMTransformer3DModel", caption_channels=parts.WIDTH, chunk_plucker_channels=12)
    )
    return _sana(vae=video_vae(), transformer=net)


def _world_call() -> dict[str, Any]:
    made = _without(_call(guidance_scale=2.0), "complex_human_instruction", "use_resolution_binning")
    lens = np.array([30.0, 30.0, 16.0, 16.0])
    return {**made, "image": parts.picture(32, 32), "action": "w-8", "intrinsics": lens, "num_frames": 9}


def t5_gemma() -> dict[str, Any]:
    """The encoder of T5-Gemma and a tokenizer."""
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    from shardit.models.tiny.weights import fill

    layers = {"layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 16, "dropout_rate": 0.0}
    encoder = T5GemmaEncoder(T5GemmaModuleConfig(**parts.DECODER, **layers))
    fill(encoder, "T5GemmaEncoder")
    return {"text_encoder": encoder.eval(), "tokenizer": parts.tokenizer("t5", length=16)}


def _prx(vae: bool = True) -> dict[str, Any]:
    name = "diffusers.models.transformers.transformer_prx:PRXTransformer2DModel"
    channels = 4 if vae else 3
    net = parts.like(name, context_in_dim=parts.WIDTH, in_channels=channels)
    made = {"transformer": net, "scheduler": parts.flow(), **t5_gemma(), "default_sample_size": 512}
    return {**made, "vae": deep_vae()} if vae else {**made, "prompt_max_tokens": 16}


def _prx_call() -> dict[str, Any]:
    return _without(_call(), "complex_human_instruction", "max_sequence_length")


def _entry(
    name: str, made: Callable[[], dict[str, Any]], arguments: Callable[[], dict[str, Any]], **config: Any
) -> PipelineEntry:
    return PipelineEntry(name, lambda: parts.pipeline(name, **made(), **config), arguments)


def _picture() -> Any:
    return parts.picture(32, 32)


ENTRIES: tuple[PipelineEntry, ...] = (
    _entry("SanaPipeline", _sana, _call),
    _entry("SanaPAGPipeline", _sana, lambda: _call(pag_scale=2.0), pag_applied_layers="transformer_blocks.1"),
    _entry("SanaControlNetPipeline", _controlled, lambda: _call(control_image=_picture())),
    _entry("SanaSprintPipeline", _sprint, _distilled),
    _entry("SanaSprintImg2ImgPipeline", _sprint, lambda: _distilled(image=_picture(), strength=0.6)),
    _entry("SanaVideoPipeline", _video, _video_call),
    _entry("SanaImageToVideoPipeline", _video, lambda: _video_call(image=_picture())),
    _entry("SanaWMPipeline", _world, _world_call),
    _entry("PRXPipeline", _prx, _prx_call),
    _entry("PRXPixelPipeline", lambda: _prx(vae=False), _prx_call),
)
