"""The autoencoders of the tiny checkpoints. A deeper one (32x) stands in if the pipeline fixes 1024 x 1024."""

from __future__ import annotations

from shardit.models.tiny.recipes.recipe import Part


def kl(
    scaling_factor: float, shift_factor: float | None, channels: tuple[int, ...] = (8, 8, 16, 16), tile: int = 64
) -> Part:
    """`AutoencoderKL` with 16 latent channels, as in SD3, Flux, Z-Image, LongCat and Ovis.

    `enable_tiling` of this class takes no sizes: the tile size is `tile`, from the config.
    """
    config = {
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "sample_size": tile,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return Part("model", "diffusers", "AutoencoderKL", config)


def _latent_statistics(channels: int) -> dict[str, list[float]]:
    """Means and deviations that differ per channel, as in the real configs."""
    return {
        "latents_mean": [round(((7 * i) % 11 - 5) / 10, 4) for i in range(channels)],
        "latents_std": [round(1.0 + ((5 * i) % 13) / 8, 4) for i in range(channels)],
    }


WAN_VAE = Part(
    "model",
    "diffusers",
    "AutoencoderKLWan",
    {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1, **_latent_statistics(16)},
)

# Wan2.2-TI2V-5B: residual blocks, 2 x 2 pixel patches, 48 latent channels at 1/16 size.
WAN_VAE_TI2V = Part(
    "model",
    "diffusers",
    "AutoencoderKLWan",
    {
        "base_dim": 8,
        "decoder_base_dim": 8,
        "z_dim": 48,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        **_latent_statistics(48),
    },
)


def qwen(base: int, mult: list[int], res_blocks: int, image_channels: int = 3) -> Part:
    """`AutoencoderKLQwenImage`; its scale is 2 ** (levels - 1)."""
    levels = len(mult) - 1
    config = {
        "base_dim": base,
        "z_dim": 16,
        "dim_mult": mult,
        "num_res_blocks": res_blocks,
        "temperal_downsample": [False] * (levels - 2) + [True, True],
        "input_channels": image_channels,
        **_latent_statistics(16),
    }
    return Part("model", "diffusers", "AutoencoderKLQwenImage", config)


QWEN_VAE = qwen(8, [1, 1, 2, 2], 1)
QWEN_VAE_DEEP = qwen(8, [1] * 6, 0)
QWEN_VAE_DEEP_RGBA = qwen(6, [1] * 6, 0, image_channels=4)
