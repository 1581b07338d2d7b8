"""Small VAEs of many diffusers classes with random weights, and inputs that fall into several tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

KL = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}
TILE = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
STRIDE = {"tile_sample_stride_height": 24, "tile_sample_stride_width": 24}


@dataclass(frozen=True)
class Entry:
    """A VAE class: its config, arguments of `enable_tiling`, shapes of what is decoded and encoded, more arguments."""

    cls: str
    config: dict[str, Any] = field(hash=False)
    latent: tuple[int, ...]
    sample: tuple[int, ...] | None
    tiling: dict[str, Any] = field(default_factory=lambda: {**TILE, **STRIDE}, hash=False)
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)
    decode: dict[str, Any] = field(default_factory=dict, hash=False)

    def build(self) -> Any:
        """The VAE, with the same weights every time."""
        import diffusers

        torch.manual_seed(0)
        vae = getattr(diffusers, self.cls)(**self.config).eval()
        with torch.no_grad():
            for p in vae.parameters():  # some start at zero
                p.copy_(torch.randn(p.shape) * (0.5 if p.ndim < 2 else p[0].numel() ** -0.5))
        return vae

    def calls(self, vae: Any) -> dict[str, Callable[[], torch.Tensor]]:
        """The methods that there is an input for, to be called."""
        more = {"decode": self.decode, "encode": {}}

        def call(name: str, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return tensor_of(getattr(vae, name)(x, **more[name]))

        return {name: functools.partial(call, name, x) for name, x in inputs(self).items()}

    def switch_on(self, vae: Any) -> None:
        """Tiles small enough for several of them."""
        vae.enable_tiling(**self.tiling)
        for name, value in self.attributes.items():
            setattr(vae, name, value)


WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
WAN |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}

ENTRIES = {
    "wan2.1": Entry("AutoencoderKLWan", WAN, (1, 4, 3, 8, 10), (1, 3, 9, 64, 80)),
    "wan2.2": Entry(
        "AutoencoderKLWan",
        {
            **WAN,
            "decoder_base_dim": 4,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
        (1, 4, 2, 6, 7),
        (1, 3, 5, 96, 144),
        {name: 2 * value for name, value in {**TILE, **STRIDE}.items()},
    ),
    "qwen": Entry(
        "AutoencoderKLQwenImage",
        {**WAN, "temperal_downsample": [False, True, True]},
        (1, 4, 1, 8, 10),
        (1, 3, 1, 64, 80),
    ),
    "kl": Entry("AutoencoderKL", KL, (1, 4, 20, 14), (1, 3, 80, 56), {}),
    "kl without quant": Entry(
        "AutoencoderKL",
        {**KL, "use_quant_conv": False, "use_post_quant_conv": False},
        (2, 4, 20, 14),
        (2, 3, 80, 56),
        {},
    ),
    "flux2": Entry("AutoencoderKLFlux2", {**KL, "patch_size": [2, 2]}, (1, 4, 20, 14), (1, 3, 80, 56), {}),
}


# Other classes of diffusers that the same mechanism covers.
EIGHTS = (8, 8, 8, 8)
VIDEO = ((1, 4, 3, 8, 10), (1, 3, 9, 64, 80))
HUNYUAN = {
    "latent_channels": 4,
    "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
    "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    "block_out_channels": EIGHTS,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
LTX = {
    "latent_channels": 8,
    "block_out_channels": EIGHTS,
    "decoder_block_out_channels": EIGHTS,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "patch_size": 1,
}
QUARTERS = {"tile_overlap_factor_height": 0.25, "tile_overlap_factor_width": 0.25}
ENTRIES |= {
    "hunyuan video": Entry("AutoencoderKLHunyuanVideo", HUNYUAN, *VIDEO),
    "hunyuan video, tiles in time": Entry(
        "AutoencoderKLHunyuanVideo",
        HUNYUAN,
        *VIDEO,
        {**TILE, **STRIDE, "tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 4},
    ),
    "ltx": Entry("AutoencoderKLLTXVideo", LTX, (1, 8, 3, 12, 16), (1, 3, 9, 48, 64)),
    "cogvideox": Entry(
        "AutoencoderKLCogVideoX",
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": EIGHTS,
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
        *VIDEO,
        {**TILE, **QUARTERS},
    ),
    "mochi": Entry(
        "AutoencoderKLMochi",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "layers_per_block": (1,) * 5,
        },
        (1, 4, 3, 8, 10),
        None,
    ),
    "allegro": Entry(
        "AutoencoderKLAllegro",
        {"block_out_channels": EIGHTS, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2},
        (1, 4, 2, 7, 10),
        (1, 3, 8, 56, 80),
        {},
        {"kernel": (8, 32, 32), "stride": (8, 24, 24)},
    ),
    "dc": Entry(
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "attention_head_dim": 2,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
        },
        (1, 4, 24, 20),
        (1, 3, 48, 40),
    ),
}


def tensor_of(result: Any) -> torch.Tensor:
    """The tensor in what decode or encode returns."""
    for name in ("sample", "latent", "latents"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    return result.latent_dist.parameters


def inputs(entry: Entry) -> dict[str, torch.Tensor]:
    """What each method is given."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"decode": entry.latent, "encode": entry.sample}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if shape}


def outputs(entry: Entry, vae: nn.Module) -> dict[str, torch.Tensor]:
    """What each method returns."""
    return {name: call() for name, call in entry.calls(vae).items()}
