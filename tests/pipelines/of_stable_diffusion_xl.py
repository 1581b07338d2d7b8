"""Stable Diffusion XL and its users: adapters, LEdits++, perturbed attention."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_stable_diffusion import adapter, edits, inverted, picture_call, solver
from tests.pipelines.of_stable_diffusion_base import call, unet

# Sizes and crops are six numbers of 8 features each (five with an aesthetic score), next to the pooled text.
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}


def added(ids: int = 6) -> dict[str, Any]:
    """Additional inputs of SDXL's UNet: sizes, pooled text, text of two encoders."""
    return {**ADDED, "cross_attention_dim": 64, "projection_class_embeddings_input_dim": 32 + 8 * ids}


def xl_unet(ids: int = 6, **changes: Any) -> Any:
    """The UNet of SDXL."""
    return unet(**{**added(ids), "transformer_layers_per_block": (1, 2), **changes})


def xl(name: str, **more: Any) -> Any:
    """A pipeline of the SDXL kind; pictures of 16 x 16."""
    made = {
        "tokenizer": parts.tokenizer("clip"),
        "tokenizer_2": parts.tokenizer("clip"),
        "text_encoder": parts.clip_text(),
        "text_encoder_2": parts.clip_text(projects=True),
        "vae": parts.vae(),
        "scheduler": parts.scheduler("EulerDiscreteScheduler", timestep_spacing="leading"),
        **more,
    }
    if "unet" not in made:
        made["unet"] = xl_unet()
    return parts.pipeline(name, **made)


def _text(**more: Any) -> dict[str, Any]:
    return call(**{"negative_prompt": "dark fog", "height": 16, "width": 16, **more})


def _inpaint(**more: Any) -> dict[str, Any]:
    return picture_call(mask_image=parts.mask(), height=16, width=16, **more)


def _adapter() -> Any:
    levels = {
        "block_out_channels": (16, 16, 32),
        "attention_head_dim": (2, 2, 4),
        "transformer_layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    features = adapter("full_adapter_xl", 4, channels=[16, 16, 32])
    return xl("StableDiffusionXLAdapterPipeline", unet=xl_unet(**levels), adapter=features)


def _ledits() -> Any:
    return inverted(xl("LEditsPPPipelineStableDiffusionXL", scheduler=solver()))


def _xl(name: str, arguments: Any = _text, **more: Any) -> PipelineEntry:
    return PipelineEntry(name, lambda: xl(name, **{k: v() if callable(v) else v for k, v in more.items()}), arguments)


_PAG = {"pag_applied_layers": ["mid", "up"]}

ENTRIES: tuple[PipelineEntry, ...] = (
    _xl("StableDiffusionXLPipeline"),
    _xl("StableDiffusionXLImg2ImgPipeline", picture_call, requires_aesthetics_score=True, unet=lambda: xl_unet(5)),
    _xl("StableDiffusionXLInpaintPipeline", _inpaint, unet=lambda: xl_unet(in_channels=9)),
    _xl(
        "StableDiffusionXLInstructPix2PixPipeline",
        lambda: _text(image=parts.picture(), image_guidance_scale=1.5),
        unet=lambda: xl_unet(in_channels=8),
    ),
    PipelineEntry("StableDiffusionXLAdapterPipeline", _adapter, lambda: _text(image=parts.picture())),
    PipelineEntry("LEditsPPPipelineStableDiffusionXL", _ledits, edits),
    _xl("StableDiffusionXLPAGPipeline", lambda: _text(pag_scale=3.0), **_PAG),
    _xl("StableDiffusionXLPAGImg2ImgPipeline", lambda: picture_call(pag_scale=3.0), **_PAG),
    _xl("StableDiffusionXLPAGInpaintPipeline", lambda: _inpaint(pag_scale=3.0), **_PAG),
)
