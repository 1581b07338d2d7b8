"""Chroma and Bria: pipelines after FLUX.1 with one text encoder."""

from __future__ import annotations

from typing import Any

from tests.pipelines import of_flux2, parts, parts_vision
from tests.pipelines.entry import PipelineEntry


def _vae() -> Any:
    return parts.vae(shift_factor=0.1, scaling_factor=1.2, use_quant_conv=False, use_post_quant_conv=False)


def chroma() -> dict[str, Any]:
    """Return the components of the pipelines of Chroma."""
    transformer = parts.like("ChromaTransformer2DModel", in_channels=16, joint_attention_dim=parts.WIDTH)
    transformer.register_to_config(guidance_embeds=False)  # the inpainting pipeline reads it
    return {
        "transformer": transformer,
        "vae": _vae(),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": parts.flow(),
    }


def bria() -> dict[str, Any]:
    """Return the components of `BriaPipeline`."""
    transformer = parts.like("BriaTransformer2DModel", in_channels=16, joint_attention_dim=parts.WIDTH)
    return {**chroma(), "vae": parts.vae(), "transformer": transformer}


def fibo() -> dict[str, Any]:
    """Return the components of the pipelines of Fibo."""
    from shardit.models.tiny.recipes.vaes import WAN_VAE_TI2V

    transformer = parts.like(
        "BriaFiboTransformer2DModel",
        in_channels=48,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=2 * parts.WIDTH,
        text_encoder_dim=parts.WIDTH,
    )
    return {
        "transformer": transformer,
        "vae": parts.wan_vae(**WAN_VAE_TI2V.config),
        # The pipeline has the id of its first token from the real vocabulary.
        "text_encoder": parts.decoder("SmolLM3ForCausalLM", vocab_size=128256),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": parts.flow(),
    }


def fibo2() -> dict[str, Any]:
    """Return the components of `BriaFibo2Pipeline`."""
    # Layers up to the 35th are the text, three of them side by side.
    return {
        "transformer": parts.like("BriaFibo2Transformer2DModel", in_channels=4, cap_feat_dim=3 * parts.WIDTH),
        "vae": of_flux2.vae(),
        "text_encoder": parts_vision.qwen3_vl(layers=36),
        "processor": parts_vision.qwen_processor("Qwen3VLProcessor", patch_size=16),
        "scheduler": parts.flow(),
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "blue",
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "output_type": "np",
        **changes,
    }


def _entry(name: str, make: Any = chroma, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


SOME = {"strength": 0.8, "num_inference_steps": 3}

ENTRIES = (
    _entry("ChromaPipeline"),
    _entry("ChromaImg2ImgPipeline", image=parts.picture, **SOME),
    _entry("ChromaInpaintPipeline", image=parts.picture, mask_image=parts.mask, true_cfg_scale=3.0, **SOME),
    _entry("BriaPipeline", bria),
    _entry("BriaFiboPipeline", fibo, height=64, width=64),
    _entry(
        "BriaFiboEditPipeline",
        fibo,
        prompt='{"edit_instruction": "a red cat"}',
        image=lambda: parts.picture(64, 64),
        height=64,
        width=64,
        _auto_resize=False,
    ),
    PipelineEntry(
        "BriaFibo2Pipeline",
        lambda: parts.pipeline("BriaFibo2Pipeline", **fibo2()),
        lambda: {k: v for k, v in call(negative_prompt=None).items() if k != "max_sequence_length"},
    ),
)
