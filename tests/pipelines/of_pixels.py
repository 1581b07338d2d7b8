"""Pipelines whose model works on pixels: DDIM, DDPM, consistency models, DeepFloyd IF, and DiT's class labels."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_stable_diffusion_base import UNET


def pixel_unet(**changes: Any) -> Any:
    """A UNet over pixels of 16 x 16."""
    config: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return parts.model("UNet2DModel", **{**config, **changes})


def _deep_floyd(larger: bool = False) -> dict[str, Any]:
    config: dict[str, Any] = {
        **UNET,
        "sample_size": 16,
        "in_channels": 6 if larger else 3,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "encoder_hid_dim": parts.WIDTH,
        "cross_attention_dim": parts.WIDTH,
        "attention_head_dim": 8,
        "resnet_time_scale_shift": "scale_shift",
        "only_cross_attention": (True, False),
        "class_embed_type": "timestep" if larger else None,
        "time_embedding_act_fn": "gelu",
    }
    noise = {
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "thresholding": True,
        "variance_type": "learned_range",
    }
    made: dict[str, Any] = {
        "unet": parts.model("UNet2DConditionModel", **config),
        "scheduler": parts.scheduler("DDPMScheduler", **noise),
        "tokenizer": parts.tokenizer("t5"),
        "text_encoder": parts.t5(),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    if larger:
        made["image_noising_scheduler"] = parts.scheduler("DDPMScheduler", beta_schedule="squaredcos_cap_v2")
    return made


def _larger() -> dict[str, Any]:
    return _deep_floyd(larger=True)


def _call(**changes: Any) -> dict[str, Any]:
    return {"num_inference_steps": 2, "output_type": "np", **changes}


def _if_call(**changes: Any) -> dict[str, Any]:
    call = {"prompt": parts.PROMPT, "negative_prompt": "blue", "clean_caption": False, "guidance_scale": 4.0}
    return {**_call(), **call, **changes}


def _if(name: str, make: Any = _deep_floyd, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, _if_call, **arguments)


def _dit() -> dict[str, Any]:
    return {
        "transformer": parts.like("DiTTransformer2DModel", num_embeds_ada_norm=1000, out_channels=8),
        "vae": parts.vae(),
        "scheduler": parts.scheduler("DDIMScheduler"),
    }


def _half() -> Any:
    return parts.picture(8, 8, seed=1)


SOME = {"strength": 0.8, "num_inference_steps": 3}
NOISE = {"noise_level": 20}

ENTRIES = (
    parts.entry(
        "DDIMPipeline", lambda: {"unet": pixel_unet(), "scheduler": parts.scheduler("DDIMScheduler")}, _call, eta=0.5
    ),
    parts.entry("DDPMPipeline", lambda: {"unet": pixel_unet(), "scheduler": parts.scheduler("DDPMScheduler")}, _call),
    parts.entry(
        "ConsistencyModelPipeline",
        lambda: {
            "unet": pixel_unet(num_class_embeds=10),
            "scheduler": parts.scheduler("CMStochasticIterativeScheduler", num_train_timesteps=40),
        },
        _call,
        class_labels=3,
    ),
    parts.entry("DiTPipeline", _dit, _call, class_labels=[3], guidance_scale=4.0),
    _if("IFPipeline"),
    _if("IFImg2ImgPipeline", image=parts.picture, **SOME),
    _if("IFInpaintingPipeline", image=parts.picture, mask_image=parts.mask, **SOME),
    _if("IFSuperResolutionPipeline", _larger, image=_half, **NOISE),
    _if("IFImg2ImgSuperResolutionPipeline", _larger, image=_half, original_image=parts.picture, **NOISE, **SOME),
    _if(
        "IFInpaintingSuperResolutionPipeline",
        _larger,
        image=_half,
        original_image=parts.picture,
        mask_image=parts.mask,
        **NOISE,
        **SOME,
    ),
)
