"""Stable Diffusion 1 and 2 beyond text to image, LEdits++, Marigold, T2I-Adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_stable_diffusion_base import call, components, unet

NEGATIVE = "dark fog"
MORE = {"safety_checker", "feature_extractor", "image_encoder"}


def picture_call(**more: Any) -> dict[str, Any]:
    """From a picture: two steps of three are done."""
    base = {"image": parts.picture(), "num_inference_steps": 3, "strength": 0.7, "negative_prompt": NEGATIVE}
    return call(**{**base, **more})


def _entry(
    name: str,
    arguments: Callable[[], dict[str, Any]],
    more: Callable[[], dict[str, Any]] = dict,
    drop: set[str] = frozenset(),  # type: ignore[assignment]
) -> PipelineEntry:
    def build() -> Any:
        made = {k: v for k, v in {**components(), **more()}.items() if k not in drop}
        return parts.pipeline(name, **made)

    return PipelineEntry(name, build, arguments)


def attention_first(**changes: Any) -> Any:
    """A UNet whose first level has attention: T2I-Adapter adds to that level before it is halved."""
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return unet(**{"down_block_types": down, "up_block_types": up, **changes})


def adapter(kind: str, downscale: int, **changes: Any) -> Any:
    """A T2I-Adapter."""
    sizes = {"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": downscale}
    return parts.model("T2IAdapter", adapter_type=kind, **{**sizes, **changes})


def inverted(pipe: Any) -> Any:
    """An LEdits++ pipeline that has inverted a picture."""
    pipe.invert(
        image=parts.picture(32, 32), num_inversion_steps=4, skip=0.1, generator=torch.Generator().manual_seed(0)
    )
    return pipe


def edits() -> dict[str, Any]:
    """Arguments of LEdits++: two edits."""
    return {"editing_prompt": ["a dog", "a boat"], "edit_guidance_scale": [5.0, 4.0], "output_type": "np"}


def solver() -> Any:
    """The scheduler that LEdits++ asks for."""
    return parts.scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=2)


def _ledits() -> Any:
    # Its attention maps have a quarter of the size of the latents.
    attention = unet(
        block_out_channels=(16, 16, 32),
        attention_head_dim=(2, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    made = components(scheduler=solver(), unet=attention)
    del made["image_encoder"]
    return inverted(parts.pipeline("LEditsPPPipelineStableDiffusion", requires_safety_checker=False, **made))


def _depth() -> dict[str, Any]:
    import transformers

    backbone = {
        "model_type": "bit",
        "layer_type": "bottleneck",
        "depths": [1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3"],
        "embedding_dynamic_padding": True,
        "global_padding": "same",
        "hidden_sizes": [16, 16, 32, 32],
        "embedding_size": 16,
        "num_groups": 2,
    }
    estimator = parts.text_model(
        "DPTForDepthEstimation",
        image_size=32,
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        backbone_out_indices=(0, 1, 2, 3),
        num_attention_heads=4,
        intermediate_size=48,
        is_hybrid=True,
        backbone_config=backbone,
        backbone_featmap_shape=[1, 32, 2, 2],
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
    )
    return {
        "unet": unet(in_channels=5),
        "depth_estimator": estimator,
        "feature_extractor": transformers.DPTImageProcessorPil(size={"height": 32, "width": 32}),
    }


def _k_unet() -> Any:
    return unet(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 32, 64, 64),
        time_cond_proj_dim=160,
        conv_in_kernel=1,
        conv_out_kernel=1,
        in_channels=8,
        out_channels=5,
        mid_block_type=None,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
    )


def _unclip(**more: Any) -> dict[str, Any]:
    normalizer = "diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer:StableUnCLIPImageNormalizer"
    return {
        "image_normalizer": parts.model(normalizer, embedding_dim=32),
        "image_noising_scheduler": parts.scheduler("DDPMScheduler", beta_schedule="squaredcos_cap_v2"),
        "unet": unet(
            class_embed_type="projection", projection_class_embeddings_input_dim=64, use_linear_projection=True
        ),
        **more,
    }


def _unclip_text() -> dict[str, Any]:
    return _unclip(
        prior_tokenizer=parts.tokenizer("clip"),
        prior_text_encoder=parts.clip_text(projects=True),
        prior=parts.model(
            "PriorTransformer", num_attention_heads=2, attention_head_dim=16, embedding_dim=32, num_layers=4
        ),
        prior_scheduler=parts.scheduler(
            "DDPMScheduler",
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
            beta_schedule="squaredcos_cap_v2",
        ),
    )


def _variation() -> dict[str, Any]:
    return {"image_encoder": parts.clip_vision(), "feature_extractor": parts.clip_pictures()}


def _upscale() -> dict[str, Any]:
    lower = parts.scheduler("DDPMScheduler")
    return {"unet": unet(in_channels=7, num_class_embeds=100), "low_res_scheduler": lower}


def _marigold(name: str, outputs: int = 4, **config: Any) -> PipelineEntry:
    def build() -> Any:
        made = {k: v for k, v in components().items() if k not in MORE}
        made["unet"] = unet(in_channels=4 + outputs, out_channels=outputs)
        return parts.pipeline(name, **made, **config)

    def arguments() -> dict[str, Any]:
        sizes = {"processing_resolution": 0, "ensemble_size": 1, "match_input_resolution": False}
        return {"image": parts.picture(), "num_inference_steps": 2, "output_type": "np", **sizes}

    return PipelineEntry(name, build, arguments)


_INTRINSICS = {"target_names": ["albedo", "shading"], "albedo": {"prediction_space": "srgb"}, "shading": {}}

ENTRIES: tuple[PipelineEntry, ...] = (
    _entry("StableDiffusionImg2ImgPipeline", picture_call),
    _entry(
        "StableDiffusionInpaintPipeline",
        lambda: picture_call(mask_image=parts.mask(), height=16, width=16),
        lambda: {"unet": unet(in_channels=9)},
    ),
    _entry(
        "StableDiffusionInstructPix2PixPipeline",
        lambda: call(image=parts.picture(), image_guidance_scale=1.5),
        lambda: {"unet": unet(in_channels=8)},
    ),
    _entry("StableDiffusionDepth2ImgPipeline", picture_call, _depth, {"safety_checker", "image_encoder"}),
    _entry(
        "StableDiffusionImageVariationPipeline",
        lambda: {k: v for k, v in call(image=parts.picture(), height=16, width=16).items() if k != "prompt"},
        _variation,
        {"tokenizer", "text_encoder"},
    ),
    _entry(
        "StableDiffusionLatentUpscalePipeline",
        lambda: call(image=parts.picture(16, 16), guidance_scale=4.0),
        lambda: {"unet": _k_unet(), "scheduler": parts.scheduler("EulerDiscreteScheduler", prediction_type="sample")},
        MORE,
    ),
    _entry(
        "StableDiffusionUpscalePipeline",
        lambda: call(image=parts.picture(8, 8), noise_level=20),
        _upscale,
        {"image_encoder"},
    ),
    _entry("StableUnCLIPPipeline", lambda: call(prior_num_inference_steps=2), _unclip_text, MORE),
    _entry(
        "StableUnCLIPImg2ImgPipeline",
        lambda: call(image=parts.picture()),
        lambda: _unclip(**_variation()),
        {"safety_checker"},
    ),
    PipelineEntry("LEditsPPPipelineStableDiffusion", _ledits, edits),
    _marigold("MarigoldDepthPipeline", prediction_type="depth", scale_invariant=True, shift_invariant=True),
    _marigold("MarigoldNormalsPipeline", prediction_type="normals", use_full_z_range=True),
    _marigold("MarigoldIntrinsicsPipeline", 8, prediction_type="intrinsics", target_properties=_INTRINSICS),
    _entry(
        "StableDiffusionAdapterPipeline",
        lambda: call(image=parts.picture(), height=16, width=16),
        lambda: {"adapter": adapter("full_adapter", 2), "unet": attention_first()},
        {"image_encoder"},
    ),
)
