"""tiny/shapes: a Wan-shaped text-to-video model with trained weights, for clips of a shape that moves on a ground.

`examples/shapes/make.py` makes the weights from nothing and measures them.
"""

from __future__ import annotations

from pathlib import Path

from shardit.models.tiny.recipes.recipe import Part, Recipe, transformer
from shardit.models.tiny.recipes.text import HIDDEN, UMT5_ENCODER

WEIGHTS = Path(__file__).with_name("shapes.safetensors")

_LATENT_CHANNELS = 3

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
                # Both are in the weights.
                "latents_mean": [0.0] * _LATENT_CHANNELS,
                "latents_std": [1.0] * _LATENT_CHANNELS,
            },
        ),
        "scheduler": Part(
            "scheduler",
            "diffusers",
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
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
        "height": 64,
        "width": 64,
        "num_frames": 13,
        "num_inference_steps": 25,
        "guidance_scale": 3.0,
        "max_sequence_length": 24,
    },
    weights=WEIGHTS,
    prompt="a blue square moves to the right on a white ground",
)
