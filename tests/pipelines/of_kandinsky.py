"""Kandinsky 2.1, 2.2 and 3."""

from __future__ import annotations

from typing import Any

import torch

from shardit.models.tiny.words import VOCAB
from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry


def movq(**changes: Any) -> Any:
    """The autoencoder: pictures twice as large as latents of 4 channels."""
    config: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "norm_type": "spatial",
        "num_vq_embeddings": 12,
        "vq_embed_dim": 4,
    }
    return parts.model("VQModel", **{**config, **changes})


def unet(**changes: Any) -> Any:
    """The UNet, which takes an embedding of a picture for condition."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": parts.WIDTH,
        "encoder_hid_dim": parts.WIDTH,
        "resnet_time_scale_shift": "scale_shift",
        "addition_embed_type": "image",
        "encoder_hid_dim_type": "image_proj",
    }
    return parts.model("UNet2DConditionModel", **{**config, **changes})


def _encoder() -> Any:
    return parts.text_model(
        "diffusers.pipelines.kandinsky.text_encoder:MultilingualCLIP",
        transformerDimSize=parts.WIDTH,
        imageDimSize=parts.WIDTH,
        vocab_size=VOCAB,
        hidden_size=parts.WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )


def _ddim() -> Any:
    # Little noise: an untrained model would else make latents of any size, and pictures cut off at black and white.
    return parts.scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False, beta_end=0.0005)


def two_one(channels: int = 4) -> dict[str, Any]:
    """Return the components of the decoders of Kandinsky 2.1."""
    kinds = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"}
    return {
        "text_encoder": _encoder(),
        "tokenizer": parts.tokenizer("t5", length=77),
        "unet": unet(in_channels=channels, **kinds),
        "scheduler": _ddim(),
        "movq": movq(),
    }


def two_two(channels: int = 4, **kinds: Any) -> dict[str, Any]:
    """Return the components of the decoders of Kandinsky 2.2."""
    return {"unet": unet(in_channels=channels, **kinds), "scheduler": _ddim(), "movq": movq()}


def _hinted() -> dict[str, Any]:
    return two_two(8, addition_embed_type="image_hint")


def prior() -> dict[str, Any]:
    """Return the components of the priors: text to the embedding of a picture."""
    model = parts.model(
        "PriorTransformer", num_attention_heads=2, attention_head_dim=12, embedding_dim=parts.WIDTH, num_layers=4
    )
    with torch.no_grad():
        model.clip_std.add_(1)
    return {
        "prior": model,
        "image_encoder": parts.clip_vision(),
        "text_encoder": parts.clip_text(projects=True),
        "tokenizer": parts.tokenizer("clip"),
        "scheduler": parts.scheduler("UnCLIPScheduler", prediction_type="sample", clip_sample_range=5.0),
        "image_processor": parts.clip_pictures(),
    }


def both(decoder: dict[str, Any]) -> dict[str, Any]:
    """A decoder and a prior, for the combined pipelines."""
    return {**decoder, **{f"prior_{name}": part for name, part in prior().items()}}


def three() -> dict[str, Any]:
    """Return the components of the pipelines of Kandinsky 3."""
    return {
        "unet": parts.like("Kandinsky3UNet", encoder_hid_dim=parts.WIDTH),
        "scheduler": parts.scheduler("DDPMScheduler", beta_schedule="squaredcos_cap_v2", clip_sample=True),
        "movq": movq(),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5"),
    }


def _embedding(seed: int) -> Any:
    return torch.randn(1, parts.WIDTH, generator=torch.Generator().manual_seed(seed))


def _steps(**changes: Any) -> dict[str, Any]:
    return {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np", **changes}


def _decode(**changes: Any) -> dict[str, Any]:
    embeddings = {"image_embeds": _embedding(1), "negative_image_embeds": _embedding(2)}
    return {**_steps(height=16, width=16), **embeddings, **changes}


def _decode_text(**changes: Any) -> dict[str, Any]:
    return {"prompt": parts.PROMPT, "negative_prompt": "blue", **_decode(), **changes}


def _combined(**changes: Any) -> dict[str, Any]:
    text = {"prompt": parts.PROMPT, "negative_prompt": "blue", "prior_num_inference_steps": 2}
    return {**_steps(height=16, width=16), **text, **changes}


def _prior_call(**changes: Any) -> dict[str, Any]:
    return {**_steps(output_type="pt"), "prompt": parts.PROMPT, "negative_prompt": "blue", **changes}


def _three_call(**changes: Any) -> dict[str, Any]:
    return {**_steps(), "prompt": parts.PROMPT, "negative_prompt": "blue", **changes}


def _entry(name: str, make: Any, call: Any, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


SOME = {"strength": 0.8, "num_inference_steps": 3}
IMAGE: dict[str, Any] = {"image": parts.picture}
MASK: dict[str, Any] = {"mask_image": parts.mask}
HINT: dict[str, Any] = {"hint": lambda: torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))}

ENTRIES = (
    _entry("KandinskyPipeline", two_one, _decode_text),
    _entry("KandinskyImg2ImgPipeline", two_one, _decode_text, **IMAGE, **SOME),
    _entry("KandinskyInpaintPipeline", lambda: two_one(9), _decode_text, **IMAGE, **MASK),
    _entry("KandinskyPriorPipeline", prior, _prior_call),
    _entry("KandinskyCombinedPipeline", lambda: both(two_one()), _combined),
    _entry("KandinskyImg2ImgCombinedPipeline", lambda: both(two_one()), _combined, **IMAGE, **SOME),
    _entry("KandinskyInpaintCombinedPipeline", lambda: both(two_one(9)), _combined, **IMAGE, **MASK),
    _entry("KandinskyV22Pipeline", two_two, _decode),
    _entry("KandinskyV22Img2ImgPipeline", two_two, _decode, **IMAGE, **SOME),
    _entry("KandinskyV22InpaintPipeline", lambda: two_two(9), _decode, **IMAGE, **MASK),
    _entry("KandinskyV22ControlnetPipeline", _hinted, _decode, **HINT),
    _entry("KandinskyV22ControlnetImg2ImgPipeline", _hinted, _decode, **HINT, **IMAGE, **SOME),
    _entry("KandinskyV22PriorPipeline", prior, _prior_call),
    _entry("KandinskyV22PriorEmb2EmbPipeline", prior, _prior_call, image=lambda: _embedding(4), **SOME),
    _entry("KandinskyV22CombinedPipeline", lambda: both(two_two()), _combined),
    _entry("KandinskyV22Img2ImgCombinedPipeline", lambda: both(two_two()), _combined, **IMAGE, **SOME),
    _entry("KandinskyV22InpaintCombinedPipeline", lambda: both(two_two(9)), _combined, **IMAGE, **MASK),
    _entry("Kandinsky3Pipeline", three, _three_call, height=16, width=16),
    _entry("Kandinsky3Img2ImgPipeline", three, _three_call, **IMAGE, **SOME),
)
