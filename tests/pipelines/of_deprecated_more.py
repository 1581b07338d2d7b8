"""More pipelines that diffusers keeps as deprecated: models of their own, sound, several inputs."""

from __future__ import annotations

from typing import Any

import torch

from shardit.models.tiny.words import VOCAB
from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_controlnet_xl import xl_call
from tests.pipelines.of_deprecated import amused, plain, xs
from tests.pipelines.of_sound import hifi_gan
from tests.pipelines.of_stable_diffusion_base import UNET, call, components, unet
from tests.pipelines.of_stable_diffusion_xl import added, xl, xl_unet


def _i2vgen() -> dict[str, Any]:
    config = {
        **{k: v for k, v in UNET.items() if k != "attention_head_dim"},
        "block_out_channels": (32, 32),
        "num_attention_heads": 2,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    return {
        **{k: v for k, v in components().items() if k in names},
        "unet": parts.model("I2VGenXLUNet", **config),
        "image_encoder": parts.clip_vision(),
        "feature_extractor": parts.clip_pictures(),
    }


def _painted() -> dict[str, Any]:
    import transformers
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder

    config = transformers.CLIPVisionConfig(
        hidden_size=parts.WIDTH,
        projection_dim=parts.WIDTH,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=16,
        intermediate_size=48,
        patch_size=4,
    )
    encoder = parts.filled(PaintByExampleImageEncoder(config), "PaintByExampleImageEncoder")
    changes = {"unet": unet(in_channels=9), "image_encoder": encoder, "feature_extractor": parts.clip_pictures()}
    return {k: v for k, v in components(**changes).items() if k not in ("text_encoder", "tokenizer")}


def _clap() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
        "pad_token_id": 1,
    }


def _audioldm() -> dict[str, Any]:
    config = {"class_embed_type": "simple_projection", "class_embeddings_concat": True, "cross_attention_dim": (16, 32)}
    return {
        "unet": unet(projection_class_embeddings_input_dim=32, **config),
        "vae": parts.vae(in_channels=1, out_channels=1),
        "text_encoder": parts.text_model("ClapTextModelWithProjection", **_clap()),
        "tokenizer": parts.tokenizer("t5", length=77),
        "scheduler": parts.scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
        "vocoder": hifi_gan(),
    }


def _wuerstchen(prior: bool) -> dict[str, Any]:
    module = "diffusers.pipelines.deprecated.wuerstchen"
    made: dict[str, Any] = {
        "tokenizer": parts.tokenizer("clip"),
        "text_encoder": parts.clip_text(),
        "scheduler": parts.scheduler("DDPMWuerstchenScheduler"),
    }
    if prior:
        return {
            **made,
            "prior": parts.model(f"{module}:WuerstchenPrior", c_in=2, c=8, depth=4, c_cond=32, c_r=8, nhead=2),
        }
    sizes: dict[str, Any] = {"c_hidden": [16, 16], "nhead": [-1, 2], "blocks": [2, 2], "level_config": ["CT", "CTA"]}
    net = parts.model(
        f"{module}:WuerstchenDiffNeXt", c_cond=32, inject_effnet=[False, True], effnet_embd=2, clip_embd=32, **sizes
    )
    vqgan = parts.model(f"{module}:PaellaVQModel", levels=1, bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=24)
    return {**made, "decoder": net, "vqgan": vqgan}


def _both_wuerstchen() -> dict[str, Any]:
    prior = {f"prior_{name}": part for name, part in _wuerstchen(prior=True).items()}
    return {**_wuerstchen(prior=False), **prior}


def _parallel() -> dict[str, Any]:
    return plain(scheduler=parts.scheduler("DDIMParallelScheduler"))


def _steps(**changes: Any) -> dict[str, Any]:
    return {"prompt": parts.PROMPT, "num_inference_steps": 2, "guidance_scale": 3.0, **changes}


def _entry(name: str, make: Any, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


SIZE = {"height": 16, "width": 16}
SOME = {"strength": 0.8, "num_inference_steps": 3}
NEGATIVE = {"negative_prompt": "blue"}


def _embeddings() -> torch.Tensor:
    return torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(2))


ENTRIES = (
    _entry("AmusedImg2ImgPipeline", amused, image=parts.picture, **NEGATIVE, **SOME),
    _entry("AmusedInpaintPipeline", amused, image=parts.picture, mask_image=parts.mask, **NEGATIVE, **SOME),
    _entry("StableDiffusionInpaintPipelineLegacy", plain, image=parts.picture, mask_image=parts.mask, **SOME),
    _entry("StableDiffusionModelEditingPipeline", plain, **SIZE),
    _entry("StableDiffusionParadigmsPipeline", _parallel, parallel=2, **SIZE),
    _entry("StableDiffusionLDM3DPipeline", lambda: components(vae=parts.vae(in_channels=6, out_channels=6)), **SIZE),
    _entry(
        "StableDiffusionAttendAndExcitePipeline",
        plain,
        token_indices=[2, 3],
        max_iter_to_alter=1,
        attn_res=(4, 4),
        thresholds={0: 0.5},
        **SIZE,
    ),
    _entry("TextToVideoZeroPipeline", plain, video_length=3, t0=1, t1=2, num_inference_steps=3, **SIZE),
    PipelineEntry(
        "TextToVideoZeroSDXLPipeline",
        lambda: xl("TextToVideoZeroSDXLPipeline", scheduler=parts.scheduler("DDIMScheduler")),
        lambda: xl_call(video_length=3, t0=1, t1=2, num_inference_steps=3, **SIZE),
    ),
    PipelineEntry(
        "StableDiffusionXLControlNetXSPipeline",
        lambda: xl(
            "StableDiffusionXLControlNetXSPipeline",
            unet=xl_unet(),
            controlnet=xs(transformer_layers_per_block=(1, 2), cross_attention_dim=added()["cross_attention_dim"]),
        ),
        lambda: xl_call(image=parts.picture(), **SIZE),
    ),
    _entry("I2VGenXLPipeline", _i2vgen, image=parts.picture, num_frames=3, **NEGATIVE, **SIZE),
    parts.entry(
        "PaintByExamplePipeline",
        _painted,
        lambda **changes: {k: v for k, v in call(**changes).items() if k != "prompt"},
        image=parts.picture,
        mask_image=parts.mask,
        example_image=lambda: parts.picture(seed=3),
        **SIZE,
    ),
    parts.entry("AudioLDMPipeline", _audioldm, _steps, audio_length_in_s=0.016),
    parts.entry("WuerstchenPriorPipeline", lambda: _wuerstchen(prior=True), _steps, height=128, width=128),
    parts.entry(
        "WuerstchenDecoderPipeline",
        lambda: _wuerstchen(prior=False),
        _steps,
        image_embeddings=_embeddings,
        output_type="latent",
    ),
    parts.entry(
        "WuerstchenCombinedPipeline",
        _both_wuerstchen,
        lambda **changes: {"prompt": parts.PROMPT, "prior_num_inference_steps": 2, "num_inference_steps": 2, **changes},
        output_type="latent",
        height=128,
        width=128,
    ),
)
