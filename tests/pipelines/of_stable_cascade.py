"""Stable Cascade, Stable Video Diffusion and Shap-E: pictures, videos and shapes from embeddings of pictures."""

from __future__ import annotations

from typing import Any

import torch

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry

_UNET: dict[str, Any] = {
    "timestep_ratio_embedding_dim": 8,
    "patch_size": 1,
    "conditioning_dim": 32,
    "num_attention_heads": (2, 2),
    "down_num_layers_per_block": (1, 2),
    "up_num_layers_per_block": (2, 1),
    "down_blocks_repeat_mappers": (1, 1),
    "up_blocks_repeat_mappers": (1, 1),
    "block_out_channels": (16, 16),
    "clip_text_pooled_in_channels": parts.WIDTH,
    "kernel_size": 3,
}


def _unet(**config: Any) -> Any:
    return parts.model("diffusers.models.unets:StableCascadeUNet", **{**_UNET, **config})


def _prior_unet() -> Any:
    channels = {"in_channels": 16, "out_channels": 16, "switch_level": (False,), "clip_seq": 4}
    layers = {"block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2}
    return _unet(**channels, **layers, clip_image_in_channels=32, clip_text_in_channels=32)


def _decoder_unet() -> Any:
    layers = (
        ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
        ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
    )
    return _unet(in_channels=4, out_channels=4, effnet_in_channels=16, block_types_per_layer=layers)


def _text() -> dict[str, Any]:
    return {"tokenizer": parts.tokenizer("clip"), "text_encoder": parts.clip_text(projects=True)}


def _steps() -> Any:
    return parts.scheduler("DDPMWuerstchenScheduler")


def _seeing() -> dict[str, Any]:
    return {"feature_extractor": parts.clip_pictures(), "image_encoder": parts.clip_vision()}


def _pixels() -> Any:
    sizes = {"bottleneck_blocks": 1, "num_vq_embeddings": 8, "embed_dim": 16}
    return parts.model("diffusers.pipelines.deprecated.wuerstchen:PaellaVQModel", **sizes)


def _prior() -> Any:
    made = {**_text(), "prior": _prior_unet(), "scheduler": _steps(), **_seeing()}
    return parts.pipeline("StableCascadePriorPipeline", **made)


def _decoder() -> Any:
    made = {**_text(), "decoder": _decoder_unet(), "scheduler": _steps(), "vqgan": _pixels(), "latent_dim_scale": 4.0}
    return parts.pipeline("StableCascadeDecoderPipeline", **made)


def _combined() -> Any:
    second = {"decoder": _decoder_unet(), "scheduler": _steps(), "vqgan": _pixels()}
    first = {**_text(), "prior": _prior_unet(), "scheduler": _steps(), **_seeing()}
    prior = {f"prior_{key}": value for key, value in first.items()}
    return parts.pipeline("StableCascadeCombinedPipeline", **_text(), **second, **prior)


_WORDS = {"prompt": parts.PROMPT, "negative_prompt": "dark fog"}


def _video_parts() -> dict[str, Any]:
    net = parts.model(
        "UNetSpatioTemporalConditionModel",
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=parts.WIDTH,
        num_attention_heads=(2, 4),
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    vae = parts.model(
        "AutoencoderKLTemporalDecoder",
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
    )
    steps = parts.scheduler(
        "EulerDiscreteScheduler",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    seen = parts.text_model(  # the pipeline makes its picture 224 x 224
        "CLIPVisionModelWithProjection",
        hidden_size=32,
        projection_dim=parts.WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        intermediate_size=48,
        patch_size=56,
    )
    return {"unet": net, "vae": vae, "scheduler": steps, **_seeing(), "image_encoder": seen}


def _video_call() -> dict[str, Any]:
    sizes = {"height": 16, "width": 16, "num_frames": 3, "decode_chunk_size": 2}
    return {"image": parts.picture(), **sizes, "num_inference_steps": 2, "max_guidance_scale": 2.5, "output_type": "np"}


def _shape_parts() -> dict[str, Any]:
    prior = parts.model(
        "PriorTransformer",
        num_attention_heads=2,
        attention_head_dim=16,
        embedding_dim=32,
        num_embeddings=32,
        embedding_proj_dim=parts.WIDTH,
        time_embed_dim=32,
        num_layers=4,
        clip_embed_dim=64,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )
    renderer = parts.model(
        "diffusers.pipelines.shap_e:ShapERenderer",
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=32,
        d_hidden=8,
        n_output=12,
    )
    steps = parts.scheduler(
        "HeunDiscreteScheduler",
        beta_end=0.002,  # noise of the size of latents: differences of large numbers have few digits
        prediction_type="sample",
        clip_sample=True,
    )
    return {"prior": prior, "scheduler": steps, "shap_e_renderer": renderer}


def _image_shape() -> Any:
    seen = {"image_encoder": parts.clip_vision(projects=False), "image_processor": parts.clip_pictures()}
    made = _shape_parts()
    made["prior"] = parts.model("PriorTransformer", **{**made["prior"].config, "embedding_proj_norm_type": "layer"})
    return parts.pipeline("ShapEImg2ImgPipeline", **made, **seen)


_SHAPE = {"num_inference_steps": 2, "guidance_scale": 1.5, "output_type": "latent"}  # to render a shape takes a minute

ENTRIES: tuple[PipelineEntry, ...] = (
    PipelineEntry(
        "StableCascadePriorPipeline",
        _prior,
        lambda: {**_WORDS, "images": [parts.picture()], "num_inference_steps": 2, "output_type": "np"},
    ),
    PipelineEntry(
        "StableCascadeDecoderPipeline",
        _decoder,
        lambda: {
            **_WORDS,
            "image_embeddings": torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(2)),
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
            "output_type": "np",
        },
    ),
    PipelineEntry(
        "StableCascadeCombinedPipeline",
        _combined,
        lambda: {
            **_WORDS,
            "height": 128,
            "width": 128,
            "prior_num_inference_steps": 2,
            "num_inference_steps": 2,
            "decoder_guidance_scale": 2.0,
            "output_type": "np",
        },
    ),
    PipelineEntry(
        "StableVideoDiffusionPipeline",
        lambda: parts.pipeline("StableVideoDiffusionPipeline", **_video_parts()),
        _video_call,
    ),
    PipelineEntry(
        "ShapEPipeline",
        lambda: parts.pipeline("ShapEPipeline", **_shape_parts(), **_text()),
        lambda: {"prompt": parts.PROMPT, **_SHAPE},
    ),
    PipelineEntry("ShapEImg2ImgPipeline", _image_shape, lambda: {"image": parts.picture(), **_SHAPE}),
)
