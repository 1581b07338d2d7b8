"""FLUX.1 and what is derived from it."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry


def transformer(**changes: Any) -> Any:
    """The transformer, for packed latents of 4 channels."""
    config = {"in_channels": 16, "joint_attention_dim": parts.WIDTH, "pooled_projection_dim": parts.WIDTH}
    return parts.like("FluxTransformer2DModel", **{**config, **changes})


def components(**changes: Any) -> dict[str, Any]:
    """Return the components of `FluxPipeline`."""
    return {
        "transformer": transformer(),
        "vae": parts.vae(shift_factor=0.1, scaling_factor=1.2, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": parts.clip_text(),
        "tokenizer": parts.tokenizer("clip"),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": parts.tokenizer("t5"),
        "scheduler": parts.flow(),
        **changes,
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "output_type": "np",
        **changes,
    }


def wide(**changes: Any) -> dict[str, Any]:
    """Components whose transformer takes a control picture next to the latents."""
    return components(transformer=transformer(in_channels=32, out_channels=16), **changes)


def controlled() -> dict[str, Any]:
    """Components with a ControlNet."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": parts.WIDTH,
        "pooled_projection_dim": parts.WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return components(controlnet=parts.model("FluxControlNetModel", **config))


def _entry(name: str, make: Any = components, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


GUIDED = {"negative_prompt": "blue", "true_cfg_scale": 3.0}
IMAGE = {"image": parts.picture}
CONTROL = {"control_image": lambda: parts.picture(seed=1)}
MASK = {"mask_image": parts.mask}
SOME = {"strength": 0.8, "num_inference_steps": 3}
CONTROLNET = {**CONTROL, "controlnet_conditioning_scale": 0.7}


def _redux() -> dict[str, Any]:
    embedder = parts.model(
        "diffusers.pipelines.flux.modeling_flux:ReduxImageEncoder", redux_dim=parts.WIDTH, txt_in_features=parts.WIDTH
    )
    return {
        "image_encoder": parts.siglip_vision(),
        "feature_extractor": parts.siglip_pictures(),
        "image_embedder": embedder,
        **{k: v for k, v in components().items() if k.startswith(("text_encoder", "tokenizer"))},
    }


ENTRIES = (
    _entry("FluxPipeline", fast=True, **GUIDED),
    _entry("FluxImg2ImgPipeline", **GUIDED, **IMAGE, **SOME),
    _entry("FluxInpaintPipeline", **GUIDED, **IMAGE, **MASK, **SOME),
    _entry("FluxControlPipeline", wide, **CONTROL),
    _entry("FluxControlImg2ImgPipeline", wide, **CONTROL, **IMAGE, **SOME),
    _entry("FluxControlInpaintPipeline", wide, **CONTROL, **IMAGE, **MASK, **SOME),
    _entry("FluxControlNetPipeline", controlled, **CONTROLNET, **GUIDED),
    _entry("FluxControlNetImg2ImgPipeline", controlled, **CONTROLNET, **IMAGE, **SOME),
    _entry("FluxControlNetInpaintPipeline", controlled, **CONTROLNET, **IMAGE, **MASK, **SOME),
    _entry(
        "FluxFillPipeline",
        # Latents, masked latents and one value of the mask for every pixel of a latent.
        lambda: components(transformer=transformer(in_channels=16 + 16 + 16, out_channels=16)),
        **IMAGE,
        **MASK,
    ),
    _entry("FluxKontextPipeline", **GUIDED, **IMAGE, _auto_resize=False, max_area=256),
    _entry("FluxKontextInpaintPipeline", **GUIDED, **IMAGE, **MASK, **SOME, _auto_resize=False, max_area=256),
    PipelineEntry(
        "FluxPriorReduxPipeline",
        lambda: parts.pipeline("FluxPriorReduxPipeline", **_redux()),
        lambda: {"image": parts.picture(), "prompt": parts.PROMPT},
        generator=False,
    ),
)
