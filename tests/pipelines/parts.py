"""Tiny components that the entries share: real classes, few and narrow layers, weights from names."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from shardit.models.tiny.recipes.text import clip
from shardit.models.tiny.tokens import build_tokenizer
from shardit.models.tiny.weights import fill
from shardit.models.tiny.words import VOCAB
from tests.pipelines.entry import PipelineEntry
from tests.support import survey_models

WIDTH = 32
"""Width of every text embedding."""

PROMPT = "a red cat on a boat"
"""A prompt of words that the tiny tokenizers know."""


def filled(model: nn.Module, key: str) -> Any:
    """A model with weights from the names of its parameters, in eval mode."""
    fill(model, key)
    return model.eval()


def model(name: str, **config: Any) -> Any:
    """A model of diffusers ("Class" or "module:Class") with these arguments."""
    with torch.random.fork_rng(devices=[]):
        return filled(survey_models.find_class(name)(**config), name)


def like(entry: str, **changes: Any) -> Any:
    """A model of diffusers with the configuration that the survey of models has for it, changed; None drops one."""
    found = survey_models.entry(entry)
    config = {**found.config, **changes}
    return model(found.name, **config)


def text_model(name: str, **config: Any) -> Any:
    """A model of transformers ("Class", or "module:Class" from elsewhere) with these fields in its configuration."""
    import transformers

    cls: Any = survey_models.find_class(name) if ":" in name else getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        return filled(cls(cls.config_class(**config)), name)


def scheduler(name: str, **config: Any) -> Any:
    """A scheduler of diffusers."""
    import diffusers

    return getattr(diffusers, name)(**config)


def flow(**config: Any) -> Any:
    """The flow-matching Euler scheduler."""
    return scheduler("FlowMatchEulerDiscreteScheduler", **config)


def pipeline(name: str, **parts: Any) -> Any:
    """A pipeline of diffusers over these components and settings, without a progress bar."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fresh(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call; functions among them are called, for new pictures in each call."""
    return {name: value() if callable(value) else value for name, value in arguments.items()}


def entry(name: str, components: Callable[[], dict[str, Any]], call: Callable[..., dict[str, Any]], **more: Any) -> Any:
    """An entry whose call has these arguments more; fields of entries go to the entry."""
    of_entry = {key: more.pop(key) for key in ("generator", "rounded", "fast") if key in more}
    return PipelineEntry(name, lambda: pipeline(name, **components()), lambda: call(**fresh(more)), **of_entry)


# --- text ---------------------------------------------------------------------------------------------------------


@functools.cache
def _tokenizer(style: str, chat: str | None, length: int | None) -> Any:
    made = build_tokenizer(style, chat)
    if length is not None:
        made.model_max_length = length
    return made


def tokenizer(style: str, chat: str | None = None, length: int | None = None) -> Any:
    """A tokenizer of a style ("qwen", "clip", "t5"), with the named chat template and `model_max_length`."""
    return copy.deepcopy(_tokenizer(style, chat, length))


def clip_text(projects: bool = False, width: int = WIDTH, layers: int = 2) -> Any:
    """A CLIP text encoder, with a projection to the same width or without."""
    part = clip("CLIPTextModelWithProjection" if projects else "CLIPTextModel", layers, width)
    return text_model(part.cls, **part.config)


def t5(cls: str = "T5EncoderModel", width: int = WIDTH, layers: int = 2) -> Any:
    """A T5 encoder."""
    return text_model(
        cls,
        vocab_size=VOCAB,
        d_model=width,
        d_kv=16,
        d_ff=48,
        num_layers=layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Fields of a language model (Llama, Qwen, Gemma ...)."""


def decoder(cls: str, **changes: Any) -> Any:
    """A language model used as a text encoder."""
    return text_model(cls, **{**DECODER, **changes})


# --- pictures -----------------------------------------------------------------------------------------------------


def clip_vision(projects: bool = True, width: int = WIDTH, image: int = 16) -> Any:
    """A CLIP image encoder."""
    return text_model(
        "CLIPVisionModelWithProjection" if projects else "CLIPVisionModel",
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image,
        intermediate_size=48,
        patch_size=4,
    )


def clip_pictures(size: int = 16) -> Any:
    """The processor of CLIP's pictures that needs no torchvision."""
    import transformers

    return transformers.CLIPImageProcessorPil(crop_size=size, size={"shortest_edge": size})


def siglip_vision(width: int = WIDTH, image: int = 16) -> Any:
    """A SigLIP image encoder."""
    return text_model(
        "SiglipVisionModel",
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image,
        intermediate_size=48,
        patch_size=4,
    )


def siglip_pictures(size: int = 16) -> Any:
    """The processor of SigLIP's pictures that needs no torchvision."""
    import transformers

    return transformers.SiglipImageProcessorPil(size={"height": size, "width": size})


def picture(width: int = 16, height: int = 16, seed: int = 0, mode: str = "RGB") -> Any:
    """A picture of noise."""
    from PIL import Image

    channels = len(mode) if mode != "L" else 1
    noise = np.random.RandomState(seed).randint(0, 255, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(noise[..., 0] if mode == "L" else noise, mode)


def mask(width: int = 16, height: int = 16) -> Any:
    """A mask for painting the left half."""
    from PIL import Image

    values = np.zeros((height, width), dtype=np.uint8)
    values[:, : width // 2] = 255
    return Image.fromarray(values, "L")


def video(frames: int, width: int = 16, height: int = 16) -> list[Any]:
    """Pictures of noise, one for each frame."""
    return [picture(width, height, seed=frame) for frame in range(frames)]


def tensor_video(frames: int, width: int = 16, height: int = 16, channels: int = 3) -> torch.Tensor:
    """A video of noise from 0 to 1, (1, channels, frames, height, width)."""
    return torch.rand(1, channels, frames, height, width, generator=torch.Generator().manual_seed(5))


# --- autoencoders -------------------------------------------------------------------------------------------------


def vae(latents: int = 4, channels: tuple[int, ...] = (8, 16), **config: Any) -> Any:
    """`AutoencoderKL`; pictures are 2 ** (levels - 1) times as large as latents."""
    return model(
        "AutoencoderKL",
        **{
            "block_out_channels": channels,
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
            "layers_per_block": 1,
            "latent_channels": latents,
            "norm_num_groups": 4,
            "sample_size": 16,
            **config,
        },
    )


def wan_vae(**config: Any) -> Any:
    """`AutoencoderKLWan` with 16 latent channels, 8 times smaller, 4 times fewer frames."""
    from shardit.models.tiny.recipes.vaes import WAN_VAE

    return model(WAN_VAE.cls, **{**WAN_VAE.config, **config})
