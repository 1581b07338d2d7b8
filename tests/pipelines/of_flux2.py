"""FLUX.2."""

from __future__ import annotations

from typing import Any

from tests.pipelines import parts
from tests.pipelines.entry import PipelineEntry

PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 12,
    "patch_size": 6,
}
"""The part of Mistral 3 that sees."""

LAYERS = (0, 1, 2)
"""Layers of the encoder whose outputs are the text; side by side they are three times as wide."""


def vae(**config: Any) -> Any:
    """`AutoencoderKLFlux2`: latents of 4 channels, packed 2 x 2."""
    return parts.model(
        "AutoencoderKLFlux2",
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 16,
            **config,
        },
    )


def transformer(**changes: Any) -> Any:
    """The transformer, for packed latents of 4 channels."""
    return parts.like("Flux2Transformer2DModel", in_channels=16, joint_attention_dim=3 * parts.WIDTH, **changes)


def klein(**changes: Any) -> dict[str, Any]:
    """Return the components of the pipelines of the small model."""
    return {
        "transformer": transformer(guidance_embeds=False),
        "vae": vae(),
        "text_encoder": parts.decoder("Qwen3ForCausalLM"),
        "tokenizer": parts.tokenizer("qwen", "qwen3"),
        "scheduler": parts.flow(),
        **changes,
    }


def flux2() -> dict[str, Any]:
    """Return the components of `Flux2Pipeline`."""
    # The real processor needs torchvision; for text it does what its tokenizer does.
    tokenizer = parts.tokenizer("qwen", "qwen2_vl")
    encoder = parts.text_model(
        "Mistral3ForConditionalGeneration",
        text_config={**parts.DECODER, "model_type": "mistral", "sliding_window": None},
        vision_config=PIXTRAL,
        spatial_merge_size=1,
        image_token_index=6,
    )
    return {
        "transformer": transformer(),
        "vae": vae(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "scheduler": parts.flow(),
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "max_sequence_length": 96,
        "text_encoder_out_layers": LAYERS,
        "output_type": "np",
        **changes,
    }


def _entry(name: str, make: Any = klein, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


ENTRIES = (
    _entry("Flux2Pipeline", flux2, guidance_scale=4.0),
    _entry("Flux2KleinPipeline", guidance_scale=4.0),
    _entry(
        "Flux2KleinInpaintPipeline",
        guidance_scale=4.0,
        image=parts.picture,
        mask_image=parts.mask,
        num_inference_steps=3,
        strength=0.8,
    ),
    _entry("Flux2KleinKVPipeline", lambda: klein(is_distilled=True), image=lambda: parts.picture(64, 64)),
)
