"""ControlNets over SDXL and SD3, AnimateDiff over SDXL, and Kolors."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry
from tests.pipelines.of_animatediff import adapter
from tests.pipelines.of_controlnet import NET
from tests.pipelines.of_picture_dit import sd3
from tests.pipelines.of_stable_diffusion_base import call
from tests.pipelines.of_stable_diffusion_xl import added, xl, xl_unet


def _net(union: bool = False, **changes: Any) -> Any:
    config = {**NET, **added(), "transformer_layers_per_block": (1, 2), "conditioning_embedding_out_channels": (8, 16)}
    if union:
        config |= {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    return parts.model("ControlNetUnionModel" if union else "ControlNetModel", **{**config, **changes})


def xl_call(**changes: Any) -> dict[str, Any]:
    """Arguments of pipelines of the SDXL kind."""
    return call(negative_prompt="blue", **changes)


def _xl(name: str, union: bool = False, **arguments: Any) -> PipelineEntry:
    more = {"control_mode": [1]} if union else {}
    return PipelineEntry(
        name,
        lambda: xl(name, controlnet=_net(union)),
        lambda: call(negative_prompt="blue", **more, **parts.fresh(arguments)),
    )


def _animated() -> Any:
    heads = {"attention_head_dim": (2, 4)}
    return xl("AnimateDiffSDXLPipeline", unet=xl_unet(**heads), motion_adapter=adapter(use_motion_mid_block=False))


def _sd3(extra: int = 0) -> dict[str, Any]:
    net = parts.model(
        "SD3ControlNetModel",
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=12,
        extra_conditioning_channels=extra,
    )
    return {**sd3(), "controlnet": net}


@functools.cache
def _glm_vocabulary() -> bytes:
    """A sentencepiece model with the words of the tiny tokenizers."""
    import sentencepiece

    from shardit.models.tiny.words import corpus

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()),
            model_prefix=f"{folder}/tokenizer",
            vocab_size=300,
            hard_vocab_limit=False,
            minloglevel=3,
        )
        return Path(folder, "tokenizer.model").read_bytes()


def kolors() -> dict[str, Any]:
    """Return the components of the pipelines of Kolors: SDXL with ChatGLM for text."""
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.model")
        file.write_bytes(_glm_vocabulary())
        tokenizer = ChatGLMTokenizer(str(file))
    encoder = parts.text_model(
        "diffusers.pipelines.kolors:ChatGLMModel",
        num_layers=4,
        padded_vocab_size=512,
        hidden_size=parts.WIDTH,
        ffn_hidden_size=48,
        kv_channels=8,
        num_attention_heads=4,
        seq_length=64,
        add_qkv_bias=True,
        multi_query_attention=True,
        multi_query_group_num=2,
        rmsnorm=True,
        original_rope=True,
        max_length=64,
    )
    text = {"cross_attention_dim": parts.WIDTH, "encoder_hid_dim": parts.WIDTH, "encoder_hid_dim_type": "text_proj"}
    return {
        "unet": xl_unet(**text),
        "vae": parts.vae(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "scheduler": parts.scheduler("EulerDiscreteScheduler", timestep_spacing="leading"),
    }


def kolors_call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return call(**{"negative_prompt": "blue", "max_sequence_length": 32, "height": 16, "width": 16, **changes})


def _control() -> Any:
    return parts.picture(seed=1)


IMAGE = {"image": parts.picture}
INPAINT: dict[str, Any] = {**IMAGE, "mask_image": parts.mask}
CONTROL = {"control_image": _control}
SOME = {"strength": 0.8, "num_inference_steps": 3}
SIZE = {"height": 16, "width": 16}

ENTRIES = (
    _xl("StableDiffusionXLControlNetPipeline", image=_control, **SIZE),
    _xl("StableDiffusionXLControlNetImg2ImgPipeline", **IMAGE, **CONTROL, **SOME),
    _xl("StableDiffusionXLControlNetInpaintPipeline", **INPAINT, **CONTROL, **SOME, **SIZE),
    _xl("StableDiffusionXLControlNetUnionPipeline", union=True, **CONTROL, **SIZE),
    _xl("StableDiffusionXLControlNetUnionImg2ImgPipeline", union=True, **IMAGE, **CONTROL, **SOME),
    _xl("StableDiffusionXLControlNetUnionInpaintPipeline", union=True, **INPAINT, **CONTROL, **SOME, **SIZE),
    PipelineEntry("AnimateDiffSDXLPipeline", _animated, lambda: call(negative_prompt="blue", num_frames=3, **SIZE)),
    parts.entry("StableDiffusion3ControlNetPipeline", _sd3, call, **CONTROL, **SIZE),
    parts.entry(
        "StableDiffusion3ControlNetInpaintingPipeline",
        lambda: _sd3(extra=1),
        call,
        **CONTROL,
        control_mask=parts.mask,
        **SIZE,
    ),
    parts.entry("KolorsPipeline", kolors, kolors_call),
    parts.entry("KolorsImg2ImgPipeline", kolors, kolors_call, **IMAGE, **SOME),
)
