"""The parts of tiny/shapes: a Wan-shaped text-to-video model for clips of 64 x 64 pixels and 13 frames."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shardit.models.tiny.recipe import Part, Recipe, transformer
from shardit.models.tiny.text import HIDDEN, UMT5_ENCODER
from shardit.models.tiny.writer import write_folder
from shardit.training.data import shapes

SIZE, FRAMES = 64, 13

_LATENT_CHANNELS = 16

RECIPE = Recipe(
    pipeline="WanPipeline",
    config={"boundary_ratio": None, "expand_timesteps": False},
    parts={
        "tokenizer": Part("tokenizer", "transformers", "T5TokenizerFast", {"style": "shapes"}),
        "text_encoder": UMT5_ENCODER,
        "vae": Part(
            "model",
            "diffusers",
            "AutoencoderKLWan",
            {
                "base_dim": 16,
                "z_dim": _LATENT_CHANNELS,
                "dim_mult": [1, 1, 2, 2],
                "num_res_blocks": 1,
                # `autoencoder.normalize` puts both into the weights.
                "latents_mean": [0.0] * _LATENT_CHANNELS,
                "latents_std": [1.0] * _LATENT_CHANNELS,
            },
        ),
        "scheduler": Part(
            "scheduler",
            "diffusers",
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0},
        ),
        "transformer": transformer(
            "WanTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=_LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            text_dim=HIDDEN,
            freq_dim=64,
            ffn_dim=512,
            num_layers=8,
            rope_max_seq_len=64,
        ),
        "transformer_2": None,
    },
    call={
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "num_inference_steps": 25,
        "guidance_scale": 3.0,
        "max_sequence_length": 24,
    },
)


def pixels(drawing: shapes.Drawing) -> torch.Tensor:
    """Return a drawn clip as (3, frames, height, width) in [-1, 1]."""
    return torch.from_numpy(drawing.frames(SIZE, SIZE, FRAMES)).permute(3, 0, 1, 2) / 127.5 - 1


def built(component: str, seed: int = 1) -> Any:
    """Return a component as its library makes it."""
    import diffusers
    import transformers

    part = RECIPE.parts[component]
    assert part is not None
    torch.manual_seed(seed)
    if part.library == "diffusers":
        return getattr(diffusers, part.cls)(**part.config)
    cls = getattr(transformers, part.cls)
    return cls(cls.config_class(**part.config))


def write(weights: Path, folder: Path) -> None:
    """Write the folder of a pipeline whose tensors, named COMPONENT.NAME, are in one file."""
    write_folder("shapes", dataclasses.replace(RECIPE, weights=weights), folder, torch.float32)


def join(states: dict[str, dict[str, torch.Tensor]], file: Path, dtype: torch.dtype) -> None:
    """Write the tensors of components into one file."""
    tensors = {
        f"{component}.{name}": tensor.to(dtype).contiguous().clone()
        for component, state in states.items()
        for name, tensor in state.items()
    }
    save_file(tensors, str(file))
